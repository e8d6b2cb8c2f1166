// Charts of a report on runs, or on arms with the means of their runs. Every figure's numbers stand once, in the page's data; what is drawn is made from them here.
"use strict";
(() => {
  // A comparison has arms for runs, and other words for its axes.
  const { runs, axes, charts, reliability, line = "run", titles = {} } = JSON.parse(document.getElementById("drawn").textContent);
  const AXIS = {
    tokens: { title: "training tokens", column: "training_tokens", exponentformat: "B", hoverformat: ",d" },
    flops: { title: "FLOPs of player and critics in the run", column: "flops", exponentformat: "power", hoverformat: ".4~g" },
    all_flops: { title: "FLOPs", column: "all_flops", exponentformat: "power", hoverformat: ".4~g" },
    seconds: { title: "seconds", column: "seconds", exponentformat: "none", hoverformat: ".4~g" },
  };
  for (const [name, title] of Object.entries(titles)) AXIS[name].title = title;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // A finger that drags over a chart wants to scroll the page.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const all = [...charts, ...reliability];

  const axis = () => AXIS[document.querySelector("input[name=axis]:checked").value];
  const isShown = (run) => document.querySelector(`input[name=run][value="${run}"]`).checked;
  const isCurve = (chart) => "event" in chart;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  // Plotly reads a few tags in names; these are names of folders.
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const number = (value) =>
    Math.abs(value) < 1e10 ? value.toLocaleString("en", { maximumSignificantDigits: 10 }) : value.toPrecision(4);

  /** Places of a series on the chosen axis; undefined for a run that did not log them. */
  function places(chart, series) {
    if (!isCurve(chart)) return series.x;
    const name = document.querySelector("input[name=axis]:checked").value;
    return axes[chart.event][series.run][name] ?? undefined;
  }

  function traces(chart) {
    const lines = chart.series.map((series) => {
      const run = runs[series.run];
      const ink = colour(`run${run.colour}`);
      const isTraining = chart.event === "train";  // many points, of which markers would leave nothing to be seen
      return {
        type: "scatter", mode: "lines+markers", name: plain(run.name), x: places(chart, series) ?? [], y: series.y,
        customdata: series.count, visible: isShown(series.run),
        line: { color: ink, width: isTraining ? 1.5 : 2, dash: run.dash || "solid" },
        marker: { color: ink, size: isTraining ? 6 : 7, symbol: run.marker, maxdisplayed: isTraining ? 8 : 0 },
        hovertemplate: isCurve(chart)
          ? "%{y:.5~g}"
          : "%{data.name}: accuracy %{y:.3~g} at confidence %{x:.3~g}, n = %{customdata:,}<extra></extra>",
      };
    });
    if (isCurve(chart)) return lines;
    const ends = chart.scale === "log" ? [1e-6, 1] : [0, 1];
    const diagonal = { color: colour("quiet"), width: 1 };
    return [...lines, { type: "scatter", mode: "lines", x: ends, y: ends, line: diagonal, hoverinfo: "skip" }];
  }

  function layout(chart) {
    const { exponentformat, hoverformat } = axis();
    const title = (text) => ({ text, standoff: 6 });
    const lines = { gridcolor: colour("line"), zeroline: false, automargin: true };
    const scale = isCurve(chart)
      ? { x: { title: title(axis().title), exponentformat, hoverformat, rangemode: "tozero" },
          y: { title: title(chart.unit), exponentformat: "power" } }
      : { x: { title: title("mean confidence"), ...range(chart) }, y: { title: title("accuracy"), ...range(chart) } };
    return {
      margin: { l: 52, r: 8, t: 8, b: 40 },
      paper_bgcolor: colour("ground"), plot_bgcolor: colour("ground"),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
      showlegend: false, dragmode,
      hovermode: isCurve(chart) ? "x unified" : "closest",
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink") }, namelength: 40 },
      xaxis: { ...lines, ...scale.x }, yaxis: { ...lines, ...scale.y },
    };
  }

  /** Both axes of a reliability diagram alike: all of it, or on logarithms from the smallest number up. */
  function range(chart) {
    if (chart.scale !== "log") return { range: [0, 1] };
    const smallest = Math.min(1, ...chart.series.flatMap((series) => [...series.x, ...series.y]));
    return { type: "log", range: [Math.log10(smallest) - 0.1, 0.05], exponentformat: "power", dtick: 1 };
  }

  function draw(chart) {
    return Plotly.react(chart.id, traces(chart), layout(chart), { displayModeBar: false, responsive: true });
  }

  const drawAll = () => Promise.all(all.map(draw));

  // --- reading with the keyboard ---

  function readPoints(chart) {
    const plot = document.getElementById(chart.id);
    const readout = plot.nextElementSibling;
    let place = null;

    function stop() {
      place = null;
      readout.textContent = "";
      Plotly.Fx.unhover(plot);
    }

    function show(step) {
      const points = plot.data.flatMap((trace, curveNumber) =>
        trace.visible && chart.series[curveNumber]
          ? trace.y.map((y, pointNumber) => ({ curveNumber, pointNumber, x: trace.x[pointNumber], y }))
          : []
      ).filter((point) => point.y !== null && (point.x ?? null) !== null);
      const grid = [...new Set(points.map((point) => point.x))].sort((one, other) => one - other);
      if (grid.length === 0) return;
      const next = place === null ? (step > 0 ? 0 : grid.length - 1) : grid.findLastIndex((x) => x <= place) + step;
      place = grid[Math.min(Math.max(next, 0), grid.length - 1)];
      const here = points.filter((point) => point.x === place);
      const names = here.map((point) => `${runs[chart.series[point.curveNumber].run].name} ${number(point.y)}`);
      readout.textContent = `${number(place)} ${plot.layout.xaxis.title.text}: ${names.join(", ")}`;
      Plotly.Fx.hover(plot, here.map(({ curveNumber, pointNumber }) => ({ curveNumber, pointNumber })));
    }

    plot.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") show(-1);
      else if (event.key === "ArrowRight") show(+1);
      else if (event.key === "Escape") stop();
      else return;
      event.preventDefault();
    });
    plot.addEventListener("blur", stop);
    return stop;
  }

  // --- saving what is drawn ---

  /** A cell of text, which no spreadsheet takes for a formula. */
  const cell = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? "'" : "") + text.replaceAll('"', '""')}"`;

  function asCsv(chart) {
    const header = isCurve(chart) ? [line, axis().column, chart.metric] : [line, "confidence", "accuracy", "count"];
    const rows = chart.series.filter((series) => isShown(series.run)).flatMap((series) =>
      (places(chart, series) ?? []).map((x, i) =>
        [cell(runs[series.run].name), x, series.y[i], ...(isCurve(chart) ? [] : [series.count[i]])].join(",")
      )
    );
    return [header.join(","), ...rows, ""].join("\r\n");
  }

  function save(chart) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([asCsv(chart)], { type: "text/csv" }));
    link.download = `${chart.id}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  // --- what the reader does ---

  const stops = all.map(readPoints);
  for (const input of document.querySelectorAll("input[name=run], input[name=axis]")) {
    input.addEventListener("change", () => {
      stops.forEach((stop) => stop());
      drawAll();
    });
  }
  for (const button of document.querySelectorAll(".save")) {
    button.addEventListener("click", () => save(all.find((chart) => chart.id === button.dataset.chart)));
  }
  dark.addEventListener("change", drawAll);
  drawAll();
})();
