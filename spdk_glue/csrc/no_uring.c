/* SPDX-License-Identifier: Apache-2.0 */
/* The twin of the engines on io_uring for a machine without liburing: names that nobody can ask for. */
#include <stddef.h>

#include "engine.h"

const struct engine_ops engine_uring = {.name = NULL};
const struct engine_ops engine_uring_cmd = {.name = NULL};
