// The page of one feature alone, for a notebook: everything is in the page.

import {h} from "./dom.js";
import {watchDark} from "./dark.js";
import {themeColors} from "./palette.js";
import {integer} from "./text.js";
import {decompressed} from "./embedded.js";
import {FeaturePanel} from "./feature_panel.js";

/** Show the page in a `<script>` element: `{run, page, others, first}`. */
export async function mountFeature(element, script) {
  const {run, page, others, first} = await decompressed(script.textContent);
  const ids = {
    close: () => null,
    go: (id) => panel.notify(`In Python: run.feature("${id}", step=${page.step})`),
  };
  const panel = new FeaturePanel({}, ids);
  panel.closing.hidden = true;
  const root = h("main", {class: "lib-view lib-alone"}, panel.element);
  watchDark((dark) => {
    root.classList.toggle("lib-dark", dark);
    themeColors(root, dark);
  });
  element.append(root);
  const birth = first === page.history.steps[0] ? "present from the start" : `since step ${integer(first)}`;
  panel.element.hidden = false;
  if (panel.draw(run, page, birth)) panel.compare(page, others);
  root.dataset.ready = "true";
}
