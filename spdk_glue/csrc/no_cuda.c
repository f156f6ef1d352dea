/* SPDX-License-Identifier: Apache-2.0 */
/* The twin of cuda_driver.c, copy_cuda.c, event_cuda.c and copies_cuda.c for a build without CUDA. */
#include <errno.h>
#include <stddef.h>

#include "copies.h"

glue_copier *glue_copier_open(const char *library, int ordinal, int *error)
{
    (void)library;
    (void)ordinal;
    *error = -ENOTSUP;
    return NULL;
}

void glue_copier_gpu(const glue_copier *copier, glue_gpu *out)
{
    (void)copier;
    *out = (glue_gpu){0};
}

uint64_t glue_copier_stream(const glue_copier *copier, int which)
{
    (void)copier;
    (void)which;
    return 0;
}

int glue_copier_register(glue_copier *copier, uint64_t address, uint64_t bytes, uint64_t chunk)
{
    (void)copier;
    (void)address;
    (void)bytes;
    (void)chunk;
    return -ENOTSUP;
}

int glue_copier_unregister(glue_copier *copier, uint64_t address, uint32_t timeout_ms)
{
    (void)copier;
    (void)address;
    (void)timeout_ms;
    return -ENOTSUP;
}

int glue_copier_device_address(glue_copier *copier, uint64_t host, uint64_t *device)
{
    (void)copier;
    (void)host;
    (void)device;
    return -ENOTSUP;
}

int glue_copier_copy(glue_copier *copier, int direction, uint64_t stream, const glue_piece *pieces,
                     const glue_device_piece *device, uint32_t count)
{
    (void)copier;
    (void)direction;
    (void)stream;
    (void)pieces;
    (void)device;
    (void)count;
    return -ENOTSUP;
}

int glue_copier_wait(glue_copier *copier, uint64_t stream, glue_event *event)
{
    (void)copier;
    (void)stream;
    (void)event;
    return -ENOTSUP;
}

int glue_copier_close(glue_copier *copier, uint32_t timeout_ms)
{
    (void)copier;
    (void)timeout_ms;
    return 0;
}

void glue_copier_release(glue_copier *copier)
{
    (void)copier;
}

void glue_copier_counts(glue_copier *copier, uint32_t *events, uint64_t *registered)
{
    (void)copier;
    *events = 0;
    *registered = 0;
}

const char *glue_copier_error(void)
{
    return "this build is without CUDA";
}

const char *glue_copier_error_name(const glue_copier *copier, uint32_t error)
{
    (void)copier;
    (void)error;
    return "";
}

glue_event *glue_event_new(glue_copier *copier, int *error)
{
    (void)copier;
    *error = -ENOTSUP;
    return NULL;
}

void glue_event_release(glue_event *event)
{
    (void)event;
}

int glue_event_record(glue_event *event, uint64_t stream)
{
    (void)event;
    (void)stream;
    return -ENOTSUP;
}

int glue_events_done(glue_event *const *events, uint32_t count)
{
    (void)events;
    (void)count;
    return -ENOTSUP;
}

int copies_new(struct copies **out, const glue_copies *wanted, const glue_piece *pieces, uint32_t count,
               glue_event *const *after, uint32_t num_after)
{
    (void)wanted;
    (void)pieces;
    (void)count;
    (void)after;
    (void)num_after;
    *out = NULL;
    return -ENOTSUP;
}

int copies_may_start(struct copies *copies)
{
    (void)copies;
    return 1;
}

int copies_start(struct copies *copies, const glue_piece *piece, uint32_t number, uint64_t begin, uint64_t bytes)
{
    (void)copies;
    (void)piece;
    (void)number;
    (void)begin;
    (void)bytes;
    return -ENOTSUP;
}

int copies_end(struct copies *copies)
{
    (void)copies;
    return 0;
}

uint32_t copies_error(const struct copies *copies)
{
    (void)copies;
    return 0;
}

void copies_free(struct copies *copies)
{
    (void)copies;
}
