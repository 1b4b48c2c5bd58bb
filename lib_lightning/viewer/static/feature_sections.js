// The parts of a feature's page: numbers, examples, histogram, interactions, outputs and curves over training.

import {h, s} from "./dom.js";
import {change as signedChange, counted, integer, number, percent, quoted, signed, withError} from "./text.js";
import {BLUE, VERMILION, barFill, ink, valueColor} from "./palette.js";
import {CHART, isLogSpaced, lineChart, timeScale} from "./chart.js";
import {SMALL, exampleView, rowTable, tellingColumns} from "./renderings.js";

const CHART_HEIGHT = 86;
const HISTOGRAM_HEIGHT = 74;
// Examples of each end at another step.
const COMPARED = 2,
  COMPARED_SMALL = 5;
const ENDS = [
  ["largest", "Largest values"],
  ["smallest", "Smallest values"],
  ["spread", "Spread over the range"],
];

function section(name, title, ...content) {
  return h("section", {class: "lib-feature-part", "data-part": name}, h("h3", {}, title), content);
}

function sentence(text) {
  return h("p", {class: "lib-none"}, text);
}

/** Whether there are several snapshots: a single one, such as of a pretrained model, says nothing about time. */
function isOfTraining(page) {
  return page.history.steps.length > 1;
}

/** Importance, effects on the predictions and on a score, as a list of names and values. */
export function numbersPart(page, {birth}) {
  const {effect} = page;
  const rows = [
    ["importance", withError(page.importance, page.importance_error)],
    page.nats === null ? null : ["effect on predictions", `${withError(page.nats, page.nats_error)} nats, to second order`],
    effect ? ["without it", effectText(effect, page.step)] : null,
    isOfTraining(page) ? ["over training", birth] : null,
    (page.final_since ?? null) === null ? null : ["in its final form", `in all snapshots since step ${integer(page.final_since)}`],
    page.degenerate ? ["direction", "not determined by the samples: equally important features can be mixed freely"] : null,
  ];
  return h(
    "dl",
    {class: "lib-feature-numbers", "data-part": "numbers"},
    rows.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    effect ? null : [h("dt", {}, "without it"), h("dd", {class: "lib-none"}, "no score has been measured with this feature turned off")],
  );
}

/** "accuracy changes by −0.031 ± 0.006 …". */
function effectText({change, error, significant, step, score}, shown) {
  const verdict = significant ? "more than chance" : "could be chance";
  const text = `${(score ?? "the score").replaceAll("_", " ")} changes by ${signedChange(change, error)} when it is held at its mean`;
  const when = step > shown ? "measured later, at step" : "measured at step";
  return [h("b", {}, text), ` (${verdict}; ${when} ${integer(step)})`];
}

/** Examples at this step, `missing` is the sentence if there are none. */
export function examplesPart(page, missing) {
  if (!page.examples?.length) return section("examples", "Examples", sentence(missing));
  const hasLooks = page.examples.some(({sample}) => page.renderings[sample]);
  const options = optionsOf(page);
  return section(
    "examples",
    isOfTraining(page) ? `Examples at step ${integer(page.step)}` : "Examples",
    scaleKey(options.scale),
    options.columns ? sentence("The columns are those in which both ends differ most; point at a row to see all of them.") : null,
    hasLooks ? null : sentence("How these samples look was not kept (samples.jsonl of the run): they are named by their numbers."),
    ENDS.map(([kind, title]) => {
      const found = page.examples.filter((example) => example.kind === kind);
      return found.length ? [h("h4", {}, title), exampleList(found, page, options, title)] : null;
    }),
  );
}

function optionsOf(page) {
  return {
    shape: page.shape,
    scale: Math.max(...page.examples.map(({value}) => Math.abs(value))) || 1,
    columns: tellingColumns(page.examples, page.renderings),
  };
}

function exampleList(examples, page, options, label) {
  const rows = examples.every(({sample}) => page.renderings[sample]?.kind === "row");
  if (rows) return rowTable(examples, page.renderings, options, label);
  const small = examples.some(({sample}) => SMALL.has(page.renderings[sample]?.kind));
  return h(
    "ol",
    {class: `lib-examples${small ? " lib-small-examples" : ""}`, "aria-label": label},
    examples.map((example) => exampleView(example, page.renderings[example.sample], options)),
  );
}

/** What colours mean. */
function scaleKey(scale) {
  const stops = [-1, -0.5, 0, 0.5, 1].map((share) => valueColor(share * scale, scale)).join(", ");
  return h(
    "div",
    {class: "lib-scale"},
    h("span", {}, signed(-scale)),
    h("span", {class: "lib-scale-bar", style: {backgroundImage: `linear-gradient(to right, ${stops})`}}),
    h("span", {}, number(scale)),
    h("span", {class: "lib-none"}, "value of the feature; 0 is its mean"),
  );
}

/** The strongest examples at several steps, `pages` are `{title, step, page}`, or `{title, step, missing}`. */
export function comparisonPart(pages) {
  if (pages.length < 2) return null;
  return section(
    "comparison",
    "How its examples changed",
    h(
      "div",
      {class: "lib-comparison"},
      pages.map(({title, step, page, missing}) => {
        const heading = h("h4", {}, h("b", {}, title), ` step ${integer(step)}`);
        if (!page?.examples?.length) {
          return h("div", {class: "lib-compared", "data-step": step}, heading, sentence(missing ?? "There are no examples in this snapshot."));
        }
        const options = {...optionsOf(page), compact: true};
        return h(
          "div",
          {class: "lib-compared", "data-step": step},
          heading,
          ENDS.slice(0, 2).map(([kind, name]) => {
            const found = page.examples.filter((example) => example.kind === kind);
            const small = found.some(({sample}) => SMALL.has(page.renderings[sample]?.kind));
            return exampleList(found.slice(0, small ? COMPARED_SMALL : COMPARED), page, options, `${name} at step ${integer(step)}`);
          }),
        );
      }),
    ),
  );
}

/** The distribution of the feature's values. */
export function histogramPart(page, width) {
  if (!page.histogram) return section("histogram", "Values", sentence("This snapshot has no histogram of the feature's values."));
  const {start, width: bin, counts} = page.histogram;
  // Bins without values at both ends are left out, symmetrically.
  let rim = 0;
  while (rim < counts.length / 2 - 1 && counts[rim] === 0 && counts[counts.length - 1 - rim] === 0) rim += 1;
  const shown = counts.slice(rim, counts.length - rim);
  const most = Math.max(1, ...shown);
  const total = counts.reduce((sum, count) => sum + count, 0);
  const [low, high] = [start + rim * bin, start + (counts.length - rim) * bin];
  const bottom = HISTOGRAM_HEIGHT - 16;
  const pitch = width / shown.length;
  const label = `histogram of ${counted(total, "value")} from ${number(low)} to ${number(high)}`;
  const svg = s("svg", {width, height: HISTOGRAM_HEIGHT, class: "lib-histogram", role: "img", "aria-label": label});
  shown.forEach((count, i) => {
    const size = count ? Math.max(1.5, (count / most) * (bottom - 4)) : 0;
    const [a, b] = [low + i * bin, low + (i + 1) * bin];
    const bar = s("rect", {
      x: i * pitch,
      y: bottom - size,
      width: Math.max(0.5, pitch - 1),
      height: size,
      ...barFill((a + b) / 2, high),
    });
    bar.append(s("title", {}, `${counted(count, "value")} from ${number(a)} to ${number(b)}`));
    svg.append(bar);
  });
  const middle = width / 2;
  svg.append(
    s("line", {x1: 0, x2: width, y1: bottom, y2: bottom, class: "lib-axis"}),
    s("line", {x1: middle, x2: middle, y1: 2, y2: bottom + 4, class: "lib-axis"}),
    s("text", {x: 0, y: HISTOGRAM_HEIGHT - 4, class: "lib-tick"}, signed(low)),
    s("text", {x: middle, y: HISTOGRAM_HEIGHT - 2, class: "lib-tick", "text-anchor": "middle"}, "0 (mean)"),
    s("text", {x: width, y: HISTOGRAM_HEIGHT - 4, class: "lib-tick", "text-anchor": "end"}, number(high)),
  );
  return section("histogram", `Values at ${counted(total, "position")}`, svg);
}

/** The strongest interactions on both sides. `go(id)` goes to a feature. */
export function interactionsPart(page, go) {
  const side = (items, title) => {
    if (items === null) return null;
    return h(
      "div",
      {class: "lib-side"},
      h("h4", {}, title),
      items.length
        ? h("ol", {class: "lib-bars", "aria-label": title}, items.map((item) => interaction(item, items[0].edge, go)))
        : sentence("There are none."),
    );
  };
  const [first] = [...(page.inputs ?? []), ...(page.outputs ?? [])];
  const isSigned = first && first.attribution !== null;
  return section(
    "interactions",
    "Strongest interactions",
    first ? sentence(interactionsText(isSigned)) : null,
    h(
      "div",
      {class: "lib-sides"},
      side(page.inputs, page.inputs?.length ? `from ${page.inputs[0].layer}` : "from the layer before"),
      side(page.outputs, page.outputs?.length ? `to ${page.outputs[0].layer}` : "to the layer after"),
    ),
    first && !isSigned ? sentence("This snapshot does not have the signs of interactions.") : null,
  );
}

function interactionsText(isSigned) {
  return `Bars: strength, and its share of all strength on that side.${
    isSigned ? " A feature drives another if it pushes its value the way it goes, and holds against it if it pulls back." : ""
  }`;
}

function interaction(item, strongest, go) {
  const sign = item.attribution === null ? null : item.attribution >= 0 ? "drives" : "holds against";
  const certain = item.attribution_error === null || Math.abs(item.attribution) > 2 * item.attribution_error;
  const color = sign === null ? null : sign === "drives" ? VERMILION : BLUE;
  const title = [
    `strength ${withError(item.edge, item.edge_error)}`,
    sign && `attribution ${signedChange(item.attribution, item.attribution_error)}`,
    sign && !certain && "the sign is within two standard errors of zero",
  ];
  return h(
    "li",
    {title: title.filter(Boolean).join("\n")},
    h(
      "button",
      {type: "button", class: "lib-link", "data-feature": item.id, onclick: () => go(item.id)},
      h("b", {}, item.id),
      item.label ? ` ${item.label}` : "",
    ),
    h(
      "span",
      {class: "lib-bar-line"},
      h("span", {class: "lib-bar-fill", style: {width: `${(100 * item.edge) / strongest}%`, background: color && ink(color)}}),
    ),
    h(
      "span",
      {class: "lib-bar-text"},
      `${percent(item.share)}`,
      sign ? h("span", {class: "lib-sign"}, ` ${sign === "drives" ? "+" : "−"} ${sign}${certain ? "" : " (?)"}`) : "",
    ),
  );
}

/** The outputs that the feature raises and lowers most. */
export function outputsPart(page) {
  if (!page.raised && !page.lowered) {
    return section("outputs", "Effects on the outputs", sentence("Not measured in this snapshot. Where that takes long, the last snapshot of a training has it, and lib_lightning.interventions.output_effects measures it."));
  }
  const most = Math.max(...[...page.raised, ...page.lowered].map(({change}) => Math.abs(change))) || 1;
  const side = (items, title, color) =>
    h(
      "div",
      {class: "lib-side"},
      h("h4", {}, title),
      items.length
        ? h(
            "ol",
            {class: "lib-bars", "aria-label": title},
            items.map(({output, name, change, error}) =>
              h(
                "li",
                {},
                h("span", {class: "lib-output"}, name === null ? `output ${integer(output)}` : quoted(name)),
                h(
                  "span",
                  {class: "lib-bar-line"},
                  h("span", {class: "lib-bar-fill", style: {width: `${(100 * Math.abs(change)) / most}%`, background: color && ink(color)}}),
                ),
                h("span", {class: "lib-bar-text"}, signedChange(change, error)),
              ),
            ),
          )
        : sentence("None."),
    );
  return section(
    "outputs",
    "Outputs that it raises and lowers most",
    sentence(`Mean change of ${page.effects_on} where the feature is one standard deviation higher${page.effects_by === "derivatives" ? ", to first order" : ""}.`),
    h("div", {class: "lib-sides"}, side(page.raised, "raised", VERMILION), side(page.lowered, "lowered", BLUE)),
  );
}

/** Importance, effect on the predictions and effect on a score over training, with errors. */
export function curvesPart(page, width) {
  if (!isOfTraining(page)) return null;
  const {history} = page;
  const time = timeScale(history.steps[0], history.steps[history.steps.length - 1], width, isLogSpaced(history.steps));
  const score = history.score?.filter(Boolean).pop() ?? "the score";
  const curves = [
    ["importance", "importance", "importance_error", VERMILION],
    ["effect on predictions to second order, in nats", "nats", "nats_error", VERMILION],
    [`change of ${score} without it`, "effect", "effect_error", BLUE],
  ];
  const charts = curves.map(([title, values, errors, color]) => {
    const known = history.steps.map((_, k) => k).filter((k) => history[values][k] !== null);
    if (known.length < 2) return null;
    const pick = (list) => known.map((k) => list[k]);
    const line = {name: "", color, steps: pick(history.steps), values: pick(history[values]), errors: pick(history[errors] ?? []), dots: true};
    const chart = lineChart({series: [line], time, height: CHART_HEIGHT, log: false, label: `${title} over steps`});
    const x = time.x(page.step);
    chart.append(s("line", {x1: x, x2: x, y1: CHART.top, y2: CHART_HEIGHT - CHART.bottom, class: "lib-here"}));
    return h("div", {class: "lib-curve", "data-curve": values}, h("h4", {}, title), chart);
  });
  return section(
    "curves",
    "Over training",
    charts.some(Boolean) ? charts.filter(Boolean) : sentence("Fewer than two snapshots have this feature."),
  );
}
