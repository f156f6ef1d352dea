/* SPDX-License-Identifier: Apache-2.0 */
/* The twin of engine_uring.c for a machine without liburing: a name that nobody can ask for. */
#include <stddef.h>

#include "engine.h"

const struct engine_ops engine_uring = {.name = NULL};
