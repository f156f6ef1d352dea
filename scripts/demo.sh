#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A real run, offline: the small shipped model continues the shipped text with its KV cache offloaded.
# The text goes to stdout, the record to REPORT. Each setting can be given in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL=${MODEL:-tiny}
PROMPT_FILE=${PROMPT_FILE:-dualblade/data/sample.txt}
NEW_TOKENS=${NEW_TOKENS:-240}
MEM_BUDGET=${MEM_BUDGET:-1G}
PAGE_CACHE_BUDGET=${PAGE_CACHE_BUDGET:-2M}
REPORT=${REPORT:-build/run.json}

export HF_HUB_OFFLINE=1
mkdir -p "$(dirname "$REPORT")"
exec .venv/bin/dualblade-spdk run --model "$MODEL" --prompt-file "$PROMPT_FILE" \
    --max-new-tokens "$NEW_TOKENS" --mem-budget "$MEM_BUDGET" --page-cache-budget "$PAGE_CACHE_BUDGET" \
    --report "$REPORT" --verify "$@"
