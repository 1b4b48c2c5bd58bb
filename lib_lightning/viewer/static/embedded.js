// The source of a self-contained HTML file: everything is in the page already, compressed.

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** A source over the `<script>` elements of a film page. */
export function embeddedSource(page) {
  let runs = null;
  const all = () => (runs ??= unpacked(page.getElementById("lib-runs").textContent));
  return {
    live: false,
    async runs() {
      return (await all()).runs;
    },
    async run(name) {
      const found = (await all()).run[name];
      if (!found) throw new Error(`There is no run ${name} in this file.`);
      return found;
    },
    async snapshot(name, step) {
      const element = [...page.querySelectorAll("script.lib-snapshot")].find(
        (own) => own.dataset.run === name && Number(own.dataset.step) === step,
      );
      if (!element) throw new Error(`There is no snapshot of run ${name} at step ${step} in this file.`);
      return unpacked(element.textContent);
    },
  };
}
