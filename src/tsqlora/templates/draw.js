// The charts: Vega-Lite specifications from charts.py, in the page's own colours.

const THEME = {
  background: null,
  font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: {
    labelColor: "var(--soft)", titleColor: "var(--soft)", domainColor: "var(--soft)",
    tickColor: "var(--soft)", gridColor: "var(--line)", labelFontSize: 12, titleFontSize: 12,
    titleFontWeight: "normal",
  },
  legend: { labelColor: "var(--text)", labelFontSize: 12 },
  line: { stroke: "var(--accent)", strokeWidth: 2 },
  point: { fill: "var(--accent)" },
  bar: { fill: "var(--accent)" },
  text: { fill: "var(--text)", fontSize: 12 },
};

// The policy of the page lets in what bears its nonce, and nothing else.
async function loadVega(nonce) {
  const script = document.createElement("script");
  script.nonce = nonce;
  script.textContent = `(() => {${await unpacked("vega")}\n})();`;
  document.head.append(script);
}

async function drawCharts(charts) {
  const views = {};
  for (const place of document.querySelectorAll("[data-chart]")) {
    const name = place.dataset.chart;
    const options = {
      mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: THEME,
      tooltip: { disableDefaultStyle: true },
    };
    views[name] = (await vegaEmbed(place, charts[name], options)).view;
  }
  return views;
}
