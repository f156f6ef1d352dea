/* SPDX-License-Identifier: Apache-2.0 */
/* Host memory of a copier: pinned in chunks, and let go of when no copy uses it any more. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "copier_cuda.h"

enum { POLL_NS = 50000 };

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Are both streams idle within the time? With the context current, without the lock: copies of other
 * threads go on meanwhile. */
int copier_drain(glue_copier *copier, uint32_t timeout_ms)
{
    uint64_t deadline = now_ns() + timeout_ms * 1000000ull;
    for (int i = 0; i < 2;) {
        cu_result result = copier->driver.stream_query(copier->streams[i]);
        if (result == CU_SUCCESS)
            i++;
        else if (cuda_check(copier, CALL_stream_query, result) != -EAGAIN || now_ns() > deadline)
            return -EBUSY;
        else
            nap();
    }
    return 0;
}

int copier_unpin(glue_copier *copier, uint64_t of, int all)
{
    int failed = 0;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < copier->num_ranges; i++) {
        struct range range = copier->ranges[i];
        int wanted = all || range.of == of;
        int error = wanted ? CHECKED(copier, host_unregister, (void *)(uintptr_t)range.address) : 0;
        failed = failed ? failed : error;
        if (!wanted || error)
            copier->ranges[kept++] = range;
    }
    copier->num_ranges = kept;
    return failed;
}

static int add_range(glue_copier *copier, struct range range)
{
    if (copier->num_ranges == copier->max_ranges) {
        uint32_t most = copier->max_ranges ? 2 * copier->max_ranges : 16;
        struct range *grown = realloc(copier->ranges, most * sizeof *grown);
        if (!grown)
            return -ENOMEM;
        copier->ranges = grown;
        copier->max_ranges = most;
    }
    unsigned flags = CU_REGISTER_PORTABLE | CU_REGISTER_DEVICEMAP;
    int error = CHECKED(copier, host_register, (void *)(uintptr_t)range.address, (size_t)range.bytes, flags);
    if (!error)
        copier->ranges[copier->num_ranges++] = range;
    return error;
}

int glue_copier_register(glue_copier *copier, uint64_t address, uint64_t bytes, uint64_t chunk)
{
    if (!bytes || !chunk || chunk % 4096)
        return -EINVAL;
    int error = copier_enter(copier);
    if (error)
        return error;
    uint32_t before = copier->num_ranges;
    for (uint64_t at = 0; at < bytes && !error; at += chunk) {
        uint64_t left = bytes - at;
        error = add_range(copier, (struct range){address + at, left < chunk ? left : chunk, address});
    }
    if (error) {
        char why[160];
        snprintf(why, sizeof why, "%s", glue_copier_error());
        while (copier->num_ranges > before)
            copier->driver.host_unregister((void *)(uintptr_t)copier->ranges[--copier->num_ranges].address);
        cuda_explain(why);
    }
    copier_leave(copier);
    return error;
}

int glue_copier_unregister(glue_copier *copier, uint64_t address, uint32_t timeout_ms)
{
    int error = copier_enter(copier);
    if (error)
        return error;
    pthread_mutex_unlock(&copier->lock);
    error = copier_drain(copier, timeout_ms);
    pthread_mutex_lock(&copier->lock);
    if (!error && copier->closed)
        error = -ESHUTDOWN;
    if (!error)
        error = copier_unpin(copier, address, 0);
    copier_leave(copier);
    return error;
}

int glue_copier_device_address(glue_copier *copier, uint64_t host, uint64_t *device)
{
    cu_pointer found = 0;
    int error = copier_enter(copier);
    if (error)
        return error;
    error = CHECKED(copier, host_pointer, &found, (void *)(uintptr_t)host, 0);
    copier_leave(copier);
    *device = found;
    return error;
}

/* One past the last byte that the piece names in host memory, or 0 where there is none. */
static uint64_t end_of(const glue_piece *piece)
{
    uint64_t blocks, heads, end;
    if (!piece->blocks || !piece->heads || !piece->run_bytes ||
        __builtin_mul_overflow(piece->blocks - 1, piece->block_stride, &blocks) ||
        __builtin_mul_overflow(piece->heads - 1, piece->head_stride, &heads) ||
        __builtin_add_overflow(blocks, heads, &end) || __builtin_add_overflow(end, piece->run_bytes, &end) ||
        __builtin_add_overflow(end, piece->address, &end))
        return 0;
    return end;
}

int copier_check(const glue_copier *copier, const glue_piece *piece)
{
    uint64_t end = end_of(piece);
    for (uint32_t i = 0; i < copier->num_ranges; i++) {
        const struct range *range = &copier->ranges[i];
        if (piece->address >= range->address && end > piece->address && end <= range->address + range->bytes)
            return 0;
    }
    cuda_explain("host memory of the copy is not registered");
    return -EFAULT;
}
