"use strict";
/* Starts what the scripts add to the page. */
async function main() {
  showTips();
  offerDownloads();
  showDocuments();
  const views = [...document.querySelectorAll("script.view-data")].map((node) => JSON.parse(node.textContent));
  const view = views.length ? new TokenView(document.getElementById("token-view"), views) : null;
  if (view) await view.start();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (view) { view.painted = null; view.thumbnails(); view.render(); } });
  const download = document.getElementById("download");
  download.hidden = false;
  download.addEventListener("click", async () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await decompress(JSON.parse(document.getElementById("results").textContent)).blob());
    link.download = "results.json";
    link.click();
  });
  document.body.dataset.ready = "1";
}
main();
