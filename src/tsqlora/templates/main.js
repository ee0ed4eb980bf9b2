// Samples first, as they need no library; then the charts.

async function start(nonce) {
  const page = await unpacked("page");
  if (page.samples) startTable(await readSamples(page.samples));
  document.documentElement.dataset.samples = Math.round(performance.now());
  await loadVega(nonce);
  const views = await drawCharts(page.charts);
  startRanks(page.moments, views);
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start(document.currentScript.nonce).catch((error) => {
  const trouble = document.getElementById("trouble");
  trouble.hidden = false;
  trouble.textContent = `This browser cannot show the charts or the samples (${error}): use a current one.`;
  console.error(error);
});
