"use strict";

// The reward landscape of docs/method.md, from what models answered about their own and the others' proposals. It is
// objective/rewards.py once more, one position at a time; a test holds the two against each other.
//
// answers: {tokens, playerOrder, criticOrders, logPolicy, logCritics, logRests, bestMixture, logTempered, entropy,
// agreement}, as inspector.py keeps them; settings: the fields of AvataRLConfig, with `tail` resolved and never "sample".

const landscapeOf = (() => {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const largestOf = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity);

  function logSumExp(values) {
    const most = largestOf(values);
    return most === -Infinity ? most : most + Math.log(sum(values.map((value) => Math.exp(value - most))));
  }

  // The first K of a model's proposals, cut to the shortest prefix that reaches top_p; at least one stays.
  function proposals(order, logProbs, settings) {
    const listed = order.slice(0, settings.top_k);
    if (settings.top_p === null || settings.top_p === 1) return listed;
    let reached = 0;
    return listed.filter((place) => {
      const isKept = reached < settings.top_p;
      reached += Math.exp(logProbs[place]);
      return isKept;
    });
  }

  function criticWeights(settings, count) {
    if (Array.isArray(settings.critic_weight)) return settings.critic_weight;
    return Array(count).fill(settings.critic_weight / count);
  }

  function landscapeOf(answers, settings) {
    const lists = [answers.logPolicy, ...answers.logCritics].map((logProbs, model) => model
      ? proposals(answers.criticOrders[model - 1], logProbs, settings)
      : settings.player_proposes ? proposals(answers.playerOrder, logProbs, settings) : []);
    const places = [...new Set([0, ...lists.flat()])];
    const count = places.length, isTarget = places.map((place) => place === 0);
    const reality = isTarget.map((is) =>
      count === 1 ? 1 : is ? 1 - settings.smoothing : settings.smoothing / (count - 1));
    const logCritics = answers.logCritics.map((logProbs) => places.map((place) => logProbs[place]));
    const critic = logCritics.map((logProbs) => logProbs.map(Math.exp));
    // What each critic believes beyond the active actions, summed: one minus the others would be rounding.
    const isActive = new Set(places);
    const logOutside = answers.logCritics.map((logProbs, model) =>
      logSumExp([answers.logRests[model], ...logProbs.filter((_, place) => !isActive.has(place))]));

    const weights = criticWeights(settings, critic.length);
    const [consensus, mass] = pool(settings, reality, logCritics, logOutside, weights, isTarget);
    const threshold = settings.threshold === "none" ? null : (settings.threshold === "mass" ? mass : 1) / count;
    let rewards = consensus.map((p) =>
      threshold === null || p > threshold || count === 1 ? settings.reward_scale * p : 0);
    let scale = settings.reward_scale;
    const highest = largestOf(rewards);
    if (settings.reward_cap !== null && highest > settings.reward_cap) {
      const factor = settings.reward_cap / highest;
      rewards = rewards.map((reward) => reward * factor);
      scale *= factor;
    }

    const policy = places.map((place) => Math.exp(answers.logPolicy[place]));
    const tempered = places.map((place) => (answers.logTempered ?? answers.logPolicy)[place]);
    const isDense = settings.tail === "dense";
    // What a dense tail pays beyond the active actions.
    const outside = logOutside.map((log, model) => isDense ? scale * weights[model] * Math.exp(log) : 0);
    const expectedOutside = critic.map((probs, model) => isDense
      ? scale * weights[model] * (answers.agreement[model] - sum(probs.map((p, index) => p * policy[index]))) : 0);
    const total = sum(rewards) + sum(outside);
    const most = Math.max(largestOf(rewards), isDense ? scale * sum(weights) * answers.bestMixture : 0);
    const expected = sum(rewards.map((reward, index) => reward * policy[index])) + sum(expectedOutside);
    const divisor = settings.per_action_mean ? count : 1;
    const gradient = tempered.map((logProb, index) => (
      Math.exp(logProb) * (total / divisor + settings.entropy_coef * (logProb + answers.entropy))
      - rewards[index] / divisor) / settings.temperature);

    const favourites = lists.slice(1).map((list) => rewards[places.indexOf(list[0])] ?? 0);
    return {
      actions: places.map((place, index) => ({
        token: answers.tokens[place],
        proposedBy: [...(place === 0 ? ["text"] : []),
          ...lists.flatMap((list, model) => list.includes(place) ? [voice(model, critic.length)] : [])],
        policy: policy[index], reality: reality[index], critic: critic.map((probs) => probs[index]),
        consensus: consensus[index], reward: rewards[index], gradient: gradient[index],
      })),
      threshold,
      cross_entropy: -answers.logPolicy[0],
      expected_reward: expected,
      expected_reward_share: most > 0 ? expected / most : 0,
      other_reward_share: total > 0 ? (total - rewards[0]) / total : 0,
      active_actions: count,
      critic_wins: favourites.length
        ? sum(favourites.map((reward) => Number(reward > rewards[0]))) / favourites.length : null,
    };
  }

  const voice = (model, critics) => model === 0 ? "player" : critics === 1 ? "critic" : `critic ${model}`;

  // The consensus on the active actions, and the blend's mass before it was normalised.
  function pool(settings, reality, logCritics, logOutside, weights, isTarget) {
    const said = logCritics.map((logProbs, model) => byRule(settings, logProbs, logOutside[model], isTarget));
    const experts = [[settings.reality_weight, reality.map(Math.log)], ...said.map((log, i) => [weights[i], log])]
      .filter(([weight]) => weight > 0);
    if (settings.pool === "arithmetic") {
      const blend = isTarget.map((_, index) => sum(experts.map(([weight, log]) => weight * Math.exp(log[index]))));
      if (settings.tail === "target") blend[0] = Math.max(0, 1 - sum(blend.slice(1)));
      return [blend, 1];
    }
    // The text's token is never vetoed: what is kept of a critic is finite.
    const blend = isTarget.map((_, index) => sum(experts.map(([weight, log]) => weight * log[index])));
    const logMass = logSumExp(blend);
    return [blend.map((log) => Math.exp(log - logMass)), Math.exp(logMass)];
  }

  // What a critic says on the active actions, where its tail is one of them already.
  function byRule(settings, logProbs, logOutside, isTarget) {
    if (settings.tail === "renormalise" && settings.pool === "arithmetic") {
      const logMass = logSumExp(logProbs);
      return logProbs.map((log) => log - logMass);
    }
    if (settings.tail === "target" && settings.pool === "geometric") {
      return logProbs.map((log, index) => isTarget[index] ? logSumExp([log, logOutside]) : log);
    }
    return logProbs;
  }

  return landscapeOf;
})();
