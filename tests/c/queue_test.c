/* SPDX-License-Identifier: Apache-2.0 */
/* The states of a queue: full, refused, failing, hung, closed in the middle of things. */
#include "check.h"

#include <unistd.h>

static int case_full(void)
{
    glue_options options = options_of("mem");
    char *memory = calloc(1, BLOCK);
    glue_piece piece = plain_piece(0, memory, BLOCK);
    glue_queue *queue = queue_of(&options);
    for (uint64_t tag = 0; tag < SLOTS; tag++)
        CHECK(glue_submit(queue, GLUE_READ, tag, &piece, 1) == 1);
    CHECK(glue_submit(queue, GLUE_READ, SLOTS, &piece, 1) == 0);
    CHECK(reap_one(queue).result == BLOCK);
    CHECK(glue_submit(queue, GLUE_READ, SLOTS, &piece, 1) == 1);
    CHECK(glue_submit(queue, GLUE_READ, SLOTS, &piece, 1) == 0);
    for (int i = 0; i < SLOTS; i++)
        CHECK(reap_one(queue).result == BLOCK);
    glue_completion none;
    CHECK(glue_reap(queue, &none, 1, 1, 1000000) == 0);
    CHECK(glue_queue_close(queue) == 0);
    free(memory);
    return 0;
}

static int case_refused(void)
{
    int error = 0;
    glue_options options = options_of("no such engine");
    CHECK(!glue_queue_open(&options, &error) && error == -ENOTSUP);
    options = options_of("mem");
    options.queue_depth = 0;
    CHECK(!glue_queue_open(&options, &error) && error == -EINVAL);
    options = options_of("mem");
    options.capacity = 0;
    CHECK(!glue_queue_open(&options, &error) && error == -EINVAL);
    int closed = -1;
    options = options_of("posix");
    options.fds = &closed;
    CHECK(!glue_queue_open(&options, &error) && error == -EBADF);
    options.num_files = 0;
    CHECK(!glue_queue_open(&options, &error) && error == -EINVAL);
    options = options_of("mem");
    char memory[BLOCK];
    glue_queue *queue = queue_of(&options);
    glue_piece empty = plain_piece(0, memory, 0), far = plain_piece(UINT64_MAX - 4095, memory, 4096);
    glue_piece wide = plain_piece(0, memory, 1ull << 62), other = plain_piece(0, memory, BLOCK);
    wide.heads = wide.blocks = 1u << 31;
    other.file = 1;
    glue_piece apart = plain_piece(0, memory, 4096), close = apart, far_apart = apart;
    apart.medium_stride = 8192, apart.blocks = 2;
    close.medium_stride = 4095;
    far_apart.medium_stride = 1ull << 62, far_apart.heads = 4;
    CHECK(glue_submit(queue, GLUE_READ, 0, &empty, 1) == -EINVAL);
    CHECK(glue_submit(queue, GLUE_READ, 0, &empty, 0) == -EINVAL);
    CHECK(glue_submit(queue, GLUE_READ, 0, &other, 1) == -EINVAL);
    CHECK(glue_submit(queue, 9, 0, &other, 1) == -EINVAL);
    CHECK(glue_submit(queue, GLUE_READ, 0, &far, 1) == -EINVAL);
    CHECK(glue_submit(queue, GLUE_READ, 0, &wide, 1) == -EINVAL);
    CHECK(glue_submit(queue, GLUE_READ, 0, &apart, 1) == -EINVAL);
    CHECK(glue_submit(queue, GLUE_READ, 0, &close, 1) == -EINVAL);
    CHECK(glue_submit(queue, GLUE_READ, 0, &far_apart, 1) == -EINVAL);
    apart.blocks = 1;
    CHECK(glue_submit(queue, GLUE_TRIM, 0, &apart, 1) == -EINVAL);
    glue_completion done = run_one(queue, GLUE_READ, plain_piece((BLOCKS - 1) * BLOCK, memory, 2 * BLOCK));
    CHECK(done.result == -EIO && done.sc == 0x80 && done.offset == BLOCKS * BLOCK);
    CHECK(glue_queue_close(queue) == 0);
    return 0;
}

static void check_failed(glue_queue *queue, int op, char *memory, uint16_t sct, uint16_t sc)
{
    glue_completion done = run_one(queue, op, plain_piece(0, memory, 4 * BLOCK));
    CHECK(done.result == -EIO && done.offset == BLOCK && done.sct == sct && done.sc == sc);
}

static int case_faults(void)
{
    glue_options options = options_of("mem");
    glue_queue *queue = queue_of(&options);
    char *memory = malloc(4 * BLOCK);
    memset(memory, 1, 4 * BLOCK);
    glue_fault read_error = {GLUE_FAULT_ERROR, GLUE_READ, BLOCK, 2 * BLOCK, 1, 1, 2, 0x81};
    glue_fault torn = {GLUE_FAULT_TORN, GLUE_WRITE, BLOCK, BLOCK + 1, 0, 1, 2, 0x80};
    CHECK(glue_queue_fault(queue, &read_error) == 0 && glue_queue_fault(queue, &torn) == 0);
    CHECK(run_one(queue, GLUE_READ, plain_piece(0, memory, 4 * BLOCK)).result == 4 * BLOCK);
    check_failed(queue, GLUE_READ, memory, 2, 0x81);
    CHECK(run_one(queue, GLUE_READ, plain_piece(0, memory, 4 * BLOCK)).result == 4 * BLOCK);
    memset(memory, 1, 4 * BLOCK);
    check_failed(queue, GLUE_WRITE, memory, 2, 0x80);
    memset(memory, 9, 4 * BLOCK);
    CHECK(run_one(queue, GLUE_READ, plain_piece(BLOCK, memory, BLOCK)).result == BLOCK);
    CHECK(memory[0] == 1 && memory[BLOCK / 2 - 1] == 1 && memory[BLOCK / 2] == 0);
    CHECK(glue_queue_close(queue) == 0);
    free(memory);
    return 0;
}

/* A command that never answers must not hold close() for longer than drain_ms. */
static int case_hung(void)
{
    glue_options options = options_of("mem");
    options.drain_ms = 50;
    glue_queue *queue = queue_of(&options);
    char *memory = calloc(1, 2 * BLOCK);
    glue_fault hang = {GLUE_FAULT_HANG, GLUE_WRITE, 0, BLOCK, 0, 1, 0, 0};
    glue_piece first = plain_piece(0, memory, 2 * BLOCK), elsewhere = plain_piece(4 * BLOCK, memory, BLOCK);
    CHECK(glue_queue_fault(queue, &hang) == 0);
    CHECK(glue_submit(queue, GLUE_WRITE, 1, &first, 1) == 1);
    CHECK(glue_submit(queue, GLUE_READ, 2, &first, 1) == 1); /* waits for the hung one, never starts */
    CHECK(glue_submit(queue, GLUE_READ, 3, &elsewhere, 1) == 1);
    CHECK(reap_one(queue).tag == 3);
    uint64_t begun = clock_ns();
    CHECK(glue_queue_close(queue) == 1);
    uint64_t took = clock_ns() - begun;
    CHECK(took >= 50000000 && took < 5000000000);
    free(memory);
    return 0;
}

/* Transfers that were never reaped, at every depth of progress. */
static int case_close(void)
{
    static const char *const kinds[] = {"mem", "null", "posix"};
    FILE *file = tmpfile();
    CHECK(file && ftruncate(fileno(file), BLOCKS * BLOCK) == 0);
    int fd = fileno(file);
    char *memory = calloc(1, 4 * BLOCK);
    glue_piece piece = plain_piece(0, memory, 4 * BLOCK);
    for (unsigned round = 0; round < 200; round++) {
        glue_options options = options_of(kinds[round % 3]);
        options.fds = &fd;
        options.latency_ns = round % 2 ? 0 : 100000;
        options.drain_ms = round % 5 ? options.drain_ms : 0;
        glue_queue *queue = queue_of(&options);
        for (unsigned i = 0; i < round % SLOTS; i++)
            CHECK(glue_submit(queue, i % 2 ? GLUE_READ : GLUE_WRITE, i, &piece, 1) == 1);
        int given_up = glue_queue_close(queue);
        CHECK(given_up == 0 || !options.drain_ms);
    }
    fclose(file);
    free(memory);
    return 0;
}

static int case_flush(void)
{
    glue_options options = options_of("mem");
    options.latency_ns = 1000000;
    glue_queue *queue = queue_of(&options);
    char *memory = calloc(1, BLOCK);
    glue_piece piece = plain_piece(0, memory, BLOCK), file = {0};
    CHECK(glue_submit(queue, GLUE_WRITE, 1, &piece, 1) == 1);
    CHECK(glue_submit(queue, GLUE_FLUSH, 2, &file, 1) == 1);
    glue_completion write = reap_one(queue), flush = reap_one(queue);
    CHECK(write.tag == 1 && flush.tag == 2 && flush.result == 0);
    CHECK(glue_queue_close(queue) == 0);
    free(memory);
    return 0;
}

static int case_memory(void)
{
    int kind = -1, error = -1;
    uint64_t size = (3u << 20) + 1;
    char *memory = glue_memory_alloc(&size, 0, &kind, &error);
    CHECK(memory && !error && size == (3u << 20) + 4096 && (uint64_t)(uintptr_t)memory % (2u << 20) == 0);
    memset(memory, 1, size);
    glue_options options = options_of("mem");
    glue_queue *queue = queue_of(&options);
    CHECK(run_one(queue, GLUE_REGISTER, plain_piece(0, memory, size)).result == 0);
    CHECK(run_one(queue, GLUE_UNREGISTER, plain_piece(0, memory, size)).result == 0);
    CHECK(glue_queue_close(queue) == 0);
    glue_memory_free(memory, size);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct test_case cases[] = {
        {"full", case_full},   {"refused", case_refused}, {"faults", case_faults}, {"hung", case_hung},
        {"close", case_close}, {"flush", case_flush},     {"memory", case_memory}, {NULL, NULL},
    };
    return run_cases(cases, argc, argv);
}
