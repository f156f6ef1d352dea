/* SPDX-License-Identifier: Apache-2.0 */
/* The twin of env_spdk.c and engine_spdk.c for a machine without SPDK. */
#include <errno.h>
#include <stddef.h>

#include "engine.h"
#include "sigbus.h"

const struct engine_ops engine_spdk = {.name = NULL};

void glue_loaded(void)
{
}

int env_took_sigbus(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    return 0;
}

const char *glue_spdk_version(void)
{
    return "";
}

int glue_env_start(const glue_env_options *options)
{
    (void)options;
    return -ENOTSUP;
}

void *glue_env_alloc(uint64_t size, int *error)
{
    (void)size;
    *error = -ENOTSUP;
    return NULL;
}

void glue_env_free(void *address)
{
    (void)address;
}

int glue_log_take(char *out, uint32_t size)
{
    if (!size)
        return -EINVAL;
    *out = 0;
    return 0;
}
