// The data source of a film in one HTML file: everything is in the page, compressed.

async function decompressed(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** A data source that reads the `<script>` elements of a film. */
export function embeddedSource(page) {
  let runs = null;
  const all = () => (runs ??= decompressed(page.getElementById("lib-runs").textContent));
  return {
    live: false,
    async runs() {
      return (await all()).runs;
    },
    async run(name) {
      const found = (await all()).run[name];
      if (!found) throw new Error(`This file does not contain run ${name}.`);
      return found;
    },
    async snapshot(name, step) {
      const element = [...page.querySelectorAll("script.lib-snapshot")].find(
        (script) => script.dataset.run === name && Number(script.dataset.step) === step,
      );
      if (!element) throw new Error(`This file does not contain a snapshot of run ${name} at step ${step}.`);
      return decompressed(element.textContent);
    },
  };
}
