#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# `hugepages` from a checkout with nothing installed: it needs Python 3.11 alone, and root to reserve.
#   sudo scripts/setup_hugepages.sh --reserve 1G
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m dualblade.host hugepages "$@"
