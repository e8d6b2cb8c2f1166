"use strict";

// The page of an inspected text. Numbers are those of landscapeOf under the settings that its reader chooses; text from
// outside is put in as text only.

(() => {
  const data = JSON.parse(document.getElementById("inspection").textContent);
  const find = (id) => document.getElementById(id);
  const make = (tag, text = "", attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const three = (value) => value === 0 ? "0" : Math.abs(value) < 1e-4 ? value.toExponential(1)
    : Math.abs(value) < 1 ? value.toFixed(4) : value.toPrecision(4);
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const textOf = (token) => data.texts[token];

  // --- settings ----------------------------------------------------------------------------------------------------

  const opened = data.settings, settings = {...opened};
  const mostProposals = data.positions[0].answers.playerOrder.length;
  const CONTROLS = [
    {name: "top_k", words: "K, proposals of each model", whole: true, least: 1, most: mostProposals},
    {name: "top_p", words: "top-p (empty: none)", above: 0, most: 1, empty: true},
    {name: "smoothing", words: "ε, of the reality expert", least: 0, below: 1},
    {name: "reality_weight", words: "weight of the text", least: 0},
    {name: "critic_weight", words: "weight of the critics", least: 0},
    {name: "pool", words: "pool", choices: ["geometric", "arithmetic"]},
    {name: "tail", words: "the critic's tail", choices: ["renormalise", "target", "dense"]},
    {name: "threshold", words: "threshold", choices: ["mean", "mass", "none"]},
    {name: "reward_scale", words: "scale of rewards", above: 0},
    {name: "reward_cap", words: "cap (empty: none)", above: 0, empty: true},
    {name: "entropy_coef", words: "β, entropy bonus", least: 0},
  ];

  // Weights of several critics are shown as one number, their sum, and keep their proportion.
  const totalOf = (weight) => Array.isArray(weight) ? weight.reduce((sum, one) => sum + one, 0) : weight;

  function withTotal(total) {
    if (!Array.isArray(opened.critic_weight)) return total;
    const before = totalOf(opened.critic_weight);
    return opened.critic_weight.map((weight) => before ? total * weight / before : total / opened.critic_weight.length);
  }

  function buildSettings() {
    for (const control of CONTROLS) {
      const label = make("label"), caption = make("span", control.words);
      const input = control.choices ? make("select") : make("input", "", {type: "number", step: control.whole ? 1 : "any"});
      for (const choice of control.choices ?? []) input.append(make("option", choice, {value: choice}));
      input.id = `setting-${control.name}`;
      input.addEventListener("input", () => takeSettings());
      label.append(caption, input);
      find("settings").append(label);
    }
    find("settings").addEventListener("submit", (event) => event.preventDefault());
    find("reset").addEventListener("click", () => { Object.assign(settings, opened); showSettings(); takeSettings(); });
    showSettings();
  }

  function showSettings() {
    for (const {name} of CONTROLS) {
      const value = name === "critic_weight" ? totalOf(settings[name]) : settings[name];
      find(`setting-${name}`).value = value === null ? "" : value;
    }
  }

  // What a control holds, or a sentence that says what is wrong with it.
  function read(control) {
    const input = find(`setting-${control.name}`);
    if (control.choices) return input.value;
    if (input.value.trim() === "" && control.empty && !input.validity.badInput) return null;
    const value = Number(input.value), {least = -Infinity, above = -Infinity, most = Infinity, below = Infinity} = control;
    const isRight = input.value.trim() !== "" && Number.isFinite(value) && value >= least && value > above && value <= most
      && value < below && (!control.whole || Number.isInteger(value));
    if (isRight) return value;
    const bounds = [[least, "at least"], [above, "above"], [most, "at most"], [below, "below"]]
      .filter(([bound]) => Number.isFinite(bound)).map(([bound, words]) => `${words} ${bound}`).join(" and ");
    throw new Error(`${control.words}: expected a ${control.whole ? "whole number" : "number"} ${bounds}.`);
  }

  // The rules of AvataRLConfig about settings together.
  function check(wanted) {
    const total = wanted.reality_weight + totalOf(wanted.critic_weight);
    if (total === 0) throw new Error("At least one expert needs a weight above 0.");
    if (data.critics.length === 0 && totalOf(wanted.critic_weight) > 0) throw new Error("There is no critic to give a weight.");
    if (wanted.pool === "arithmetic" && Math.abs(total - 1) > 1e-6)
      throw new Error(`An arithmetic pool needs weights that sum to 1; they sum to ${three(total)}.`);
    if (wanted.threshold === "mass" && (wanted.pool !== "geometric" || wanted.tail !== "renormalise"))
      throw new Error("The threshold “mass” is that of a geometric pool whose tail is renormalised.");
    if (wanted.tail === "dense" && (wanted.pool !== "arithmetic" || wanted.threshold !== "none"))
      throw new Error("A dense tail needs an arithmetic pool and no threshold.");
    if (wanted.tail === "dense" && wanted.per_action_mean)
      throw new Error("These settings divide by the active actions, which a dense tail goes beyond.");
  }

  function takeSettings() {
    const wanted = {...opened};
    try {
      for (const control of CONTROLS) {
        const input = find(`setting-${control.name}`);
        input.setAttribute("aria-invalid", "true"); // unless it can be read
        wanted[control.name] = read(control);
        input.removeAttribute("aria-invalid");
      }
      wanted.critic_weight = withTotal(wanted.critic_weight);
      check(wanted);
    } catch (error) {
      find("refused").textContent = `${error.message} The numbers shown are still those of the settings before.`;
      return;
    }
    find("refused").textContent = "";
    Object.assign(settings, wanted);
    for (const {name} of CONTROLS) {
      const isChanged = JSON.stringify(settings[name]) !== JSON.stringify(opened[name]);
      find(`setting-${name}`).closest("label").classList.toggle("changed", isChanged);
    }
    compute();
    show();
  }

  // --- numbers -----------------------------------------------------------------------------------------------------

  let landscapes = [], chosen = 0, summaryOpened = null;

  function compute() {
    landscapes = data.positions.map(({answers, entropy, disagreement}) =>
      ({...landscapeOf(answers, settings), entropy, disagreement}));
  }

  function summaryOf() {
    const means = {};
    for (const name of Object.keys(data.summary)) {
      const values = landscapes.map((landscape) => landscape[name]).filter((value) => value !== null);
      if (values.length) means[name] = values.reduce((sum, value) => sum + value, 0) / values.length;
    }
    return means;
  }

  // --- the text ----------------------------------------------------------------------------------------------------

  const COLOURINGS = {
    expected_reward_share: {words: "reward the policy expects, share of the best", of: (l) => l.expected_reward_share},
    target_reward: {words: "reward of the text's token", of: (l) => l.actions[0].reward / largestReward()},
    other_reward_share: {words: "share of reward on other tokens", of: (l) => l.other_reward_share},
    cross_entropy: {words: "cross-entropy (dark: 10 nats)", of: (l) => Math.min(1, l.cross_entropy / 10)},
    disagreement: {words: "critic against text (dark: 10 nats)", of: (l) => Math.min(1, (l.disagreement ?? 0) / 10)},
  };
  const largestReward = () => Math.max(...landscapes.map((l) => Math.max(...l.actions.map((a) => a.reward)))) || 1;

  function buildCells() {
    const cells = find("cells");
    let word = null;
    data.positions.forEach((position, number) => {
      const text = textOf(position.answers.tokens[0]);
      const cell = make("button", text.replaceAll("␣", " "), {type: "button", tabindex: number ? -1 : 0, "data-number": number});
      cell.addEventListener("click", () => choose(number));
      // Lines break between words, and within what is longer than any word.
      if (!word || /^[␣⏎⇥]/.test(text) || word.textContent.length > 30) cells.append(word = make("span", "", {class: "word"}));
      word.append(cell);
      if (!text.endsWith("⏎")) return;
      cells.append(make("br"));
      word = null;
    });
    cells.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(landscapes.length - 1, chosen + step)));
      cellOf(chosen).focus();
    });
    for (const [name, {words}] of Object.entries(COLOURINGS)) {
      if (name !== "disagreement" || data.critics.length) find("colouring").append(make("option", words, {value: name}));
    }
    find("colouring").addEventListener("input", colour);
    find("scale").append("none", make("i"), "all");
  }

  const cellOf = (number) => find("cells").querySelector(`[data-number="${number}"]`);

  function colour() {
    const {words, of} = COLOURINGS[find("colouring").value];
    landscapes.forEach((landscape, number) => {
      const share = of(landscape), cell = cellOf(number);
      // The eye sees small shares better than they are: their root.
      cell.style.setProperty("--share", 0.65 * Math.sqrt(Math.max(0, Math.min(1, share))));
      const text = textOf(data.positions[number].answers.tokens[0]);
      cell.setAttribute("aria-label", `${number}: ${text}, ${percent(share)}`);
      cell.title = `${number}: ${text}\n${words}: ${percent(share)}`;
    });
  }

  // --- one position ------------------------------------------------------------------------------------------------

  function choose(number) {
    for (const place of new Set([chosen, number])) {
      cellOf(place).setAttribute("aria-pressed", place === number);
      cellOf(place).tabIndex = place === number ? 0 : -1;
    }
    chosen = number;
    const cells = find("cells"), cell = cellOf(number);
    if (cell.offsetTop < cells.scrollTop || cell.offsetTop + cell.offsetHeight > cells.scrollTop + cells.clientHeight)
      cells.scrollTop = cell.offsetTop - cells.clientHeight / 2;
    showPosition();
  }

  function showPosition() {
    const landscape = landscapes[chosen], text = textOf(data.positions[chosen].answers.tokens[0]);
    find("position-heading").textContent = `Position ${chosen}: ${text}`;
    const before = data.positions.slice(Math.max(0, chosen - 24), chosen).map((p) => textOf(p.answers.tokens[0])).join("");
    find("context").replaceChildren(before.replaceAll("␣", " "), make("b", text.replaceAll("␣", " ")));
    find("numbers").textContent = [
      `cross-entropy ${three(landscape.cross_entropy)} nats`, `entropy ${three(landscape.entropy)} nats`,
      `expected reward ${three(landscape.expected_reward)}, ${percent(landscape.expected_reward_share)} of the best`,
      `${percent(landscape.other_reward_share)} of the reward on other tokens`,
      ...(landscape.disagreement ? [`critic ${three(landscape.disagreement)} nats for another`] : []),
    ].join(" · ");
    find("actions-caption").textContent = `${landscape.active_actions} active actions`
      + (landscape.threshold === null ? ", every one of them is paid"
        : `; a consensus above ${three(landscape.threshold)} is paid`);

    const critics = data.critics.map((_, index) => data.critics.length === 1 ? "p critic" : `p critic ${index + 1}`);
    const head = make("tr");
    for (const words of ["token", "by", "p reality", ...critics, "consensus", "reward", "player π", "push"])
      head.append(make("th", words, {scope: "col"}));
    find("actions").tHead.replaceChildren(head);
    find("actions").tBodies[0].replaceChildren(...rowsOf(landscape));
  }

  function rowsOf(landscape) {
    const columns = [
      ["reality", (a) => a.reality], ...data.critics.map((_, index) => ["critic", (a) => a.critic[index]]),
      ["consensus", (a) => a.consensus], ["reward", (a) => a.reward], ["policy", (a) => a.policy], ["push", (a) => -a.gradient],
    ];
    const largest = columns.map(([, of]) => Math.max(...landscape.actions.map((action) => Math.abs(of(action)))) || 1);
    const [first, ...others] = landscape.actions.map((action, index) => [action, index]);
    const ranked = [first, ...others.sort(([a], [b]) => b.consensus - a.consensus)];
    return ranked.map(([action, index]) => {
      const row = make("tr", "", {"data-token": action.token});
      row.classList.toggle("is-text", index === 0);
      row.classList.toggle("unpaid", action.reward === 0);
      row.append(make("td", textOf(action.token), {title: textOf(action.token)}), by(action.proposedBy));
      columns.forEach(([name, of], column) => row.append(cellWithBar(name, of(action), largest[column], landscape.threshold)));
      return row;
    });
  }

  function by(voices) {
    const cell = make("td", "", {class: "words"});
    for (const voice of voices) {
      const [kind, number = ""] = voice.split(" ");
      const mark = make("b", kind[0].toUpperCase(), {class: `by ${kind}`, title: voice});
      cell.append(mark, make("span", number));
    }
    cell.setAttribute("aria-label", voices.join(", "));
    return cell;
  }

  function cellWithBar(name, value, largest, threshold) {
    const isPush = name === "push";
    const shown = isPush ? `${value > 0 ? "↑" : value < 0 ? "↓" : ""} ${three(Math.abs(value))}` : three(value);
    const cell = make("td", shown, {class: name, "data-value": value});
    const bar = make("span", "", {class: `bar of-${name}${isPush ? " two-sided" : ""}`, "aria-hidden": "true"});
    const length = make("i");
    length.style.width = `${(isPush ? 50 : 100) * Math.abs(value) / largest}%`;
    if (isPush) length.className = value > 0 ? "up" : "down";
    bar.append(length);
    if (name === "consensus" && threshold !== null && threshold <= largest) {
      const line = make("b");
      line.style.left = `${100 * threshold / largest}%`;
      bar.append(line);
    }
    cell.append(bar);
    return cell;
  }

  // --- the whole text ----------------------------------------------------------------------------------------------

  function showSummary() {
    const now = summaryOf();
    summaryOpened ??= now;
    find("summary").tBodies[0].replaceChildren(...Object.keys(now).map((name) => {
      const row = make("tr", "", {"data-name": name}), [words, unit] = data.summary[name];
      const measure = make("th", words, {scope: "row"});
      if (unit) measure.append(make("span", unit, {class: "unit"}));
      row.append(measure, make("td", three(now[name]), {"data-value": now[name]}), make("td", three(summaryOpened[name])));
      return row;
    }));
  }

  function showDisagreements() {
    const list = find("disagreements");
    if (!list) return;
    const worst = landscapes.map((landscape, number) => [landscape.disagreement, number])
      .filter(([nats]) => nats > 0).sort(([a], [b]) => b - a).slice(0, 5);
    list.replaceChildren(...worst.map(([nats, number]) => {
      const {answers} = data.positions[number], item = make("li");
      const jump = make("button", `${number}: ${textOf(answers.tokens[0])}`, {type: "button"});
      jump.addEventListener("click", () => { choose(number); cellOf(number).focus(); });
      const favourites = answers.criticOrders.map((order) => make("code", textOf(answers.tokens[order[0]])));
      item.append(jump, ` by ${three(nats)} nats for `, ...favourites.flatMap((text, index) => index ? [" and ", text] : [text]));
      return item;
    }));
  }

  function save() {
    const positions = landscapes.map((landscape, number) => ({
      text: textOf(data.positions[number].answers.tokens[0]), ...landscape,
      actions: landscape.actions.map((action) => ({...action, text: textOf(action.token)})),
    }));
    const content = JSON.stringify({player: data.player, critics: data.critics, settings, summary: summaryOf(), positions}, null, 1);
    const link = make("a", "", {download: "inspection.json"});
    link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function show() {
    colour();
    showSummary();
    showPosition();
  }

  buildSettings();
  compute();
  buildCells();
  show();
  showDisagreements();
  choose(landscapes.reduce((worst, l, number) => (l.disagreement ?? 0) > (landscapes[worst].disagreement ?? 0) ? number : worst, 0));
  find("save").addEventListener("click", save);
})();
