// Entry point for TensorBoard: the viewer with the plugin as its data source. URLs are relative to this file.

import {mount} from "./view.js";

function address(route, query) {
  const url = new URL(`./${route}`, import.meta.url);
  for (const [key, value] of Object.entries(query ?? {})) url.searchParams.set(key, value);
  return url;
}

async function request(route, query, options) {
  const response = await fetch(address(route, query), options).catch(() => {
    throw new Error("TensorBoard does not respond.");
  });
  if (response.ok) return response.json();
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error ?? `TensorBoard responded with status ${response.status} to ${route}.`);
}

const httpSource = {
  live: true,
  async runs() {
    const runs = await request("runs");
    return runs.map((run) => ({...run, page: run.comparison ? address("comparison", {run: run.name}).href : null}));
  },
  run: (name) => request("run", {run: name}),
  snapshot: (name, step) => request("snapshot", {run: name, step}),
  feature: (name, step, layer, feature) => request("feature", {run: name, step, layer, feature}),
  curveNames: () => request("curve_names"),
  curves: (kind, name) => request("curves", {kind, name}),
  sharedFeatures: () => request("shared_features"),
  async saveNote(run, feature, text) {
    const {note} = await request("note", {}, {
      method: "POST",
      headers: {"Content-Type": "application/json", "X-LIB-Note": "1"},
      body: JSON.stringify({run, feature, text}),
    });
    return {note, where: "saved in notes.json of the run"};
  },
};

/** Called by TensorBoard when the tab is opened. */
export async function render() {
  // The document of TensorBoard's frame has none of these.
  document.documentElement.lang = "en";
  document.title = "LIB";
  document.body.style.margin = "0";
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = address("view.css").href;
  await new Promise((resolve) => {
    style.addEventListener("load", resolve);
    style.addEventListener("error", resolve);
    document.head.append(style);
  });
  const element = document.createElement("div");
  document.body.append(element);
  mount(element, httpSource);
}
