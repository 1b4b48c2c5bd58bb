// The check boxes of runs. Where there are many, a field leaves those with some words in their names.

import {h} from "./dom.js";

// Runs up to which all are simply shown.
const FEW = 8;

/** Elements for labels with check boxes, `value` of each is the name of its run. */
export function runPicker(labels) {
  if (labels.length <= FEW) return labels;
  const boxes = labels.map((label) => ({label, box: label.querySelector("input")}));
  const none = h("span", {class: "lib-none", hidden: true}, "no run has these words in its name");
  const filter = h("input", {
    type: "search",
    placeholder: `filter ${labels.length} runs`,
    "data-role": "run-filter",
    "aria-label": "show runs with these words in their names",
    oninput: () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      none.hidden = false;
      for (const {label, box} of boxes) {
        const fits = words.every((word) => box.value.toLowerCase().includes(word));
        // Those that are chosen stay, to be removed.
        label.hidden = !box.checked && !fits;
        if (fits) none.hidden = true;
      }
    },
  });
  return [filter, h("div", {class: "lib-run-list"}, labels, none)];
}
