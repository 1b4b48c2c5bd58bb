// Where TensorBoard enters: the view over what the plugin serves. Addresses are relative, TensorBoard may lie anywhere.

import {mount} from "./view.js";

function address(route, query) {
  const url = new URL(`./${route}`, import.meta.url);
  for (const [key, value] of Object.entries(query ?? {})) url.searchParams.set(key, value);
  return url;
}

async function asked(route, query) {
  const response = await fetch(address(route, query)).catch(() => {
    throw new Error("TensorBoard does not answer.");
  });
  if (response.ok) return response.json();
  const told = await response.json().catch(() => ({}));
  throw new Error(told.error ?? `TensorBoard answers ${response.status} to ${route}.`);
}

const httpSource = {
  live: true,
  runs: () => asked("runs"),
  run: (name) => asked("run", {run: name}),
  snapshot: (name, step) => asked("snapshot", {run: name, step}),
};

/** Called by TensorBoard when the tab is opened. */
export async function render() {
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
