// Draws the figures of the page, in the colours of the reader's system, and again when either changes.
(() => {
  const { themes, font } = JSON.parse(document.getElementById("style").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const NARROW = 520; // pixels: names beside the lines would take too much of it
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]] };

  function layout(figure, width) {
    const { ink } = themes[dark.matches ? "dark" : "light"];
    const axis = { gridcolor: ink.grid, linecolor: ink.grid, tickfont: { color: ink.faint }, ticks: "", automargin: true };
    const legend = figure.meta.labelled && width < NARROW;
    const lines = figure.data.filter((trace) => trace.showlegend !== false).length;
    const made = {
      ...figure.layout,
      height: figure.meta.height + (legend ? 20 * lines : 0),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: font, size: 12.5, color: ink.text },
      hoverlabel: { bgcolor: ink.paper, bordercolor: ink.grid, font: { family: font, size: 12.5, color: ink.text } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: ink.faint, activecolor: ink.text },
      xaxis: { ...axis, ...figure.layout.xaxis },
      yaxis: { ...axis, ...figure.layout.yaxis },
    };
    if (figure.layout.yaxis2) made.yaxis2 = { ...axis, ...figure.layout.yaxis2 };
    for (const name of ["xaxis", "yaxis", "yaxis2"]) {
      if (!made[name]) continue;
      if (made[name].title) made[name].title = { ...made[name].title, font: { size: 12.5, color: ink.faint } };
    }
    if (legend) {
      Object.assign(made, { annotations: [], showlegend: true, margin: { ...made.margin, r: 14, b: 52 + 20 * lines } });
    }
    if (figure.meta.scale && made.margin.l > (width < NARROW ? 0.4 : 0.6) * width) { // names would leave no room for the matrix: a touch tells them
      Object.assign(made, { margin: { ...made.margin, l: 14 }, yaxis: { ...made.yaxis, showticklabels: false } });
    }
    return made;
  }

  // The end of a name, as much of it as a legend has room for beside axis and line.
  const ending = (name, width) => {
    const most = Math.floor((width - 120) / 7.5);
    return name.length > most ? `…${name.slice(1 - most)}` : name;
  };

  function traces(figure, width) {
    const legend = figure.meta.labelled && width < NARROW;
    const theme = themes[dark.matches ? "dark" : "light"];
    const colors = theme[figure.meta.scale];
    return figure.data.map((trace) => {
      if (trace.type === "heatmap") {
        const colorscale = colors.map((color, place) => [place / (colors.length - 1), color]);
        const font = { size: 12.5, color: theme.ink.faint };
        const title = { ...trace.colorbar.title, font };
        return { ...trace, colorscale, colorbar: { ...trace.colorbar, title, tickfont: font } };
      }
      if (legend && trace.name) return { ...trace, name: ending(trace.name, width) };
      if (trace.line && trace.line.color === "ink") return { ...trace, line: { ...trace.line, color: theme.ink.text } };
      return trace.error_x ? { ...trace, error_x: { ...trace.error_x, color: theme.ink.faint } } : trace;
    });
  }

  const plots = [...document.querySelectorAll(".plot")];
  const draw = (plot) => {
    const figure = JSON.parse(plot.previousElementSibling.textContent);
    const width = plot.clientWidth;
    return Plotly.react(plot, traces(figure, width), layout(figure, width), CONFIG);
  };
  plots.forEach(draw);
  dark.addEventListener("change", () => plots.forEach(draw));
  let narrow = window.innerWidth < NARROW;
  window.addEventListener("resize", () => {
    if (narrow !== (narrow = window.innerWidth < NARROW)) plots.forEach(draw);
  });
})();
