/* SPDX-License-Identifier: Apache-2.0 */
/* What the test programs share. Each is a list of cases:
 *
 *   PROGRAM [CASE...]    all cases by default; --list names them
 *
 * and ends with 0, 1 when a case failed, or 77 when every case named was skipped. */
#ifndef CHECK_H
#define CHECK_H
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

enum {
    RUN = 4096,
    HEADS = 2,
    BLOCK = RUN * HEADS,
    BLOCKS = 64, /* of the medium: few, so that transfers overlap */
    SLOTS = 24,  /* transfers that a queue takes */
    SKIP = 77,
};

/* run: 0 or SKIP; CHECK ends the program where something is not as it must be. */
struct test_case {
    const char *name;
    int (*run)(void);
};

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

static inline glue_options options_of(const char *kind)
{
    return (glue_options){.kind = kind,
                          .num_files = 1,
                          .queue_depth = 8,
                          .command_bytes = 8192,
                          .max_transfers = SLOTS,
                          .drain_ms = 10000,
                          .capacity = BLOCKS * BLOCK};
}

static inline glue_queue *queue_of(const glue_options *options)
{
    int error = 0;
    glue_queue *queue = glue_queue_open(options, &error);
    if (!queue)
        fprintf(stderr, "open %s: %s\n", options->kind, strerror(-error));
    CHECK(queue && !error);
    return queue;
}

static inline glue_piece plain_piece(uint64_t offset, void *address, uint64_t bytes)
{
    return (glue_piece){
        .offset = offset, .address = (uint64_t)(uintptr_t)address, .run_bytes = bytes, .heads = 1, .blocks = 1};
}

static inline glue_completion reap_one(glue_queue *queue)
{
    glue_completion done = {0};
    CHECK(glue_reap(queue, &done, 1, 1, 30000000000) == 1);
    return done;
}

static inline glue_completion run_one(glue_queue *queue, int op, glue_piece piece)
{
    CHECK(glue_submit(queue, op, 7, &piece, 1) == 1);
    glue_completion done = reap_one(queue);
    CHECK(done.tag == 7);
    return done;
}

static inline int run_case(const struct test_case *cases, const char *name)
{
    for (; cases->name; cases++) {
        if (strcmp(cases->name, name))
            continue;
        uint64_t begun = clock_ns();
        int result = cases->run();
        if (!result)
            printf("%s: ok (%.2f s)\n", name, (double)(clock_ns() - begun) / 1e9);
        fflush(stdout);
        return result;
    }
    fprintf(stderr, "no such case: %s\n", name);
    exit(2);
}

static inline int run_cases(const struct test_case *cases, int argc, char **argv)
{
    int ran = 0, skipped = 0, list = argc == 2 && !strcmp(argv[1], "--list");
    for (int i = 1; i < argc && !list; i++, ran++)
        skipped += run_case(cases, argv[i]) == SKIP;
    for (const struct test_case *each = cases; each->name && argc == 1; each++, ran++)
        skipped += run_case(cases, each->name) == SKIP;
    for (const struct test_case *each = cases; each->name && list; each++)
        puts(each->name);
    return ran && skipped == ran ? SKIP : 0;
}

#endif
