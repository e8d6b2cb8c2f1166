#!/bin/bash
# OpenWebText by one recipe: the text, the article's critic, a player under it, and its cross-entropy twin.
#
# bash recipes/openwebtext.sh                                    a player of 124m; also 30m and 250m
# bash recipes/openwebtext.sh 30m --checkpoint_every_steps 100   any setting, for all three trainings
#
# Everything is made where it is called: data/openwebtext, runs/critic-30m, runs/article-124m, runs/cross-entropy-124m.
# Called again after whatever stopped it, it goes on: what is finished is not made again. By the environment:
#   SOURCE     the text (hub:Skylion007/openwebtext), TOKENIZER its tokenizer (gpt2)
#   READERS    how many processes read it (8); each needs room on disk for a shard beside the data
#   AVATARL    what trains (avatarl), as in AVATARL="torchrun --nproc_per_node 8 -m avatarl"
#
# Not run at this size by us yet.
set -eu
recipes=$(dirname "$0")
size=124m
case ${1:-} in
'' | -*) ;;
*) size=$1 && shift ;;
esac
if [ ! -f "$recipes/article-$size.yaml" ]; then
  echo "openwebtext.sh: size is '$size'; expected 30m, 124m or 250m" >&2
  exit 2
fi

if [ ! -f data/openwebtext/manifest.json ]; then
  avatarl prepare "${SOURCE:-hub:Skylion007/openwebtext}" --out data/openwebtext \
    --tokenizer "${TOKENIZER:-gpt2}" --processes "${READERS:-8}"
fi
for recipe in critic-30m "article-$size" "cross-entropy-$size"; do
  # shellcheck disable=SC2086 # several words
  ${AVATARL:-avatarl} train --config "$recipes/$recipe.yaml" --resume "$@"
done
