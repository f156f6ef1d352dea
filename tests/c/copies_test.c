/* SPDX-License-Identifier: Apache-2.0 */
/* Transfers that are tied to copies of a device, on the emulated CUDA driver beside this program. */
#include "check.h"

#include <dlfcn.h>
#include <libgen.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "cuda_driver.h"

enum {
    ROWS = 3,             /* blocks of a slot */
    SLOT = ROWS * BLOCK,
    PAIRS = 3,            /* host and device slots */
    STEPS = 400,
    ILLEGAL_ADDRESS = 700,
};

static struct {
    void (*set)(uint64_t delay_us, uint64_t jitter_us, int integrated);
    void (*fail)(const char *call, int skip, int count, int code);
    void (*counts)(uint64_t out[7]);
    cu_result (*alloc)(cu_pointer *device, size_t bytes);
    cu_result (*release)(cu_pointer device);
    cu_result (*push)(cu_context context);
    cu_result (*retain)(cu_context *context, cu_device device);
    cu_result (*unretain)(cu_device device);
    cu_result (*create)(cu_stream *stream, unsigned flags);
    cu_result (*destroy)(cu_stream stream);
    cu_result (*synchronize)(cu_stream stream);
    cu_result (*launch)(cu_stream stream, void (*function)(void *), void *argument);
} cuda;

static const char *library(void)
{
    static char path[4096];
    if (!path[0]) {
        ssize_t count = readlink("/proc/self/exe", path, sizeof path - 32);
        CHECK(count > 0);
        path[count] = 0;
        strcat(dirname(path), "/libcuda.so.1");
    }
    return path;
}

static void find(void *loaded, const char *symbol, void *out)
{
    void *found = dlsym(loaded, symbol);
    CHECK(found);
    memcpy(out, &found, sizeof found);
}

/* The context stays current in this thread, as torch would have it. */
static void load_emulator(void)
{
    void *loaded = dlopen(library(), RTLD_NOW);
    CHECK(loaded);
    find(loaded, "emu_set", &cuda.set);
    find(loaded, "emu_fail", &cuda.fail);
    find(loaded, "emu_counts", &cuda.counts);
    find(loaded, "cuMemAlloc_v2", &cuda.alloc);
    find(loaded, "cuMemFree_v2", &cuda.release);
    find(loaded, "cuCtxPushCurrent_v2", &cuda.push);
    find(loaded, "cuDevicePrimaryCtxRetain", &cuda.retain);
    find(loaded, "cuDevicePrimaryCtxRelease_v2", &cuda.unretain);
    find(loaded, "cuStreamCreate", &cuda.create);
    find(loaded, "cuStreamDestroy_v2", &cuda.destroy);
    find(loaded, "cuStreamSynchronize", &cuda.synchronize);
    find(loaded, "cuLaunchHostFunc", &cuda.launch);
}

struct pair {
    char *host;
    cu_pointer device;
    glue_event *filled, *used; /* the copy to the device; the last kernel that read it */
};

struct bench {
    glue_copier *copier;
    glue_queue *queue;
    cu_stream compute;
    char *memory;
    cu_pointer device;
    struct pair pairs[PAIRS];
};

static glue_event *new_event(glue_copier *copier)
{
    int error;
    glue_event *event = glue_event_new(copier, &error);
    CHECK(event && !error);
    return event;
}

static struct bench open_bench(const glue_options *options)
{
    int error, kind;
    uint64_t size = (PAIRS + 1) * SLOT;
    cu_context context;
    load_emulator();
    cuda.set(0, 0, 0);
    struct bench bench = {.copier = glue_copier_open(library(), 0, &error), .queue = queue_of(options)};
    CHECK(bench.copier && !error);
    CHECK(!cuda.retain(&context, 0) && !cuda.push(context) && !cuda.create(&bench.compute, 1));
    bench.memory = glue_memory_alloc(&size, 0, &kind, &error);
    CHECK(bench.memory && !cuda.alloc(&bench.device, PAIRS * SLOT));
    CHECK(!glue_copier_register(bench.copier, (uint64_t)(uintptr_t)bench.memory, PAIRS * SLOT, SLOT));
    for (int i = 0; i < PAIRS; i++)
        bench.pairs[i] = (struct pair){bench.memory + i * SLOT, bench.device + (uint64_t)i * SLOT,
                                       new_event(bench.copier), new_event(bench.copier)};
    return bench;
}

/* What nobody has given back is seen. */
static void close_bench(struct bench *bench)
{
    uint64_t counts[7];
    uint32_t events;
    uint64_t registered;
    CHECK(!cuda.synchronize(bench->compute));
    if (bench->queue)
        CHECK(glue_queue_close(bench->queue) == 0);
    for (int i = 0; i < PAIRS; i++) {
        glue_event_release(bench->pairs[i].filled);
        glue_event_release(bench->pairs[i].used);
    }
    glue_copier_counts(bench->copier, &events, &registered);
    CHECK(!events && registered == PAIRS * SLOT);
    CHECK(!glue_copier_close(bench->copier, 10000));
    glue_copier_release(bench->copier);
    CHECK(!cuda.destroy(bench->compute) && !cuda.release(bench->device) && !cuda.unretain(0));
    cuda.counts(counts);
    for (int i = 0; i < 5; i++)
        CHECK(!counts[i]);
    glue_memory_free(bench->memory, (PAIRS + 1) * SLOT);
}

/* Head-major: all runs of head 0, then of head 1. */
static glue_piece slot_piece(const struct pair *pair, uint32_t first)
{
    return (glue_piece){(uint64_t)first * BLOCK, (uint64_t)(uintptr_t)pair->host, ROWS * RUN, RUN, RUN, HEADS, ROWS, 0, 0};
}

static glue_device_piece slot_on_device(const struct pair *pair)
{
    return (glue_device_piece){pair->device, ROWS * RUN, RUN};
}

static int submit_read(struct bench *bench, struct pair *pair, uint32_t first, glue_event *const *after, uint32_t num_after)
{
    glue_piece piece = slot_piece(pair, first);
    glue_device_piece device = slot_on_device(pair);
    glue_copies copies = {bench->copier, glue_copier_stream(bench->copier, GLUE_LOADS), &device, pair->filled};
    return glue_submit_copied(bench->queue, GLUE_READ, first, &piece, 1, &copies, after, num_after);
}

static void wait_event(glue_event *event)
{
    while (glue_events_done(&event, 1) == 0)
        usleep(100);
    CHECK(glue_events_done(&event, 1) == 1);
}

static void renew(glue_copier *copier, glue_event **event)
{
    glue_event_release(*event);
    *event = new_event(copier);
}

/* the kernels: they run on a stream, long after they were launched -------------------------------- */

struct kernel {
    char *at;
    uint32_t first;
    int fill; /* the round that is written; 0: read and compare */
};

static uint32_t rounds[BLOCKS]; /* what the medium holds */

static uint32_t stamp_of(uint32_t block, uint32_t head, uint32_t round)
{
    return (round * BLOCKS + block) * HEADS + head + 1;
}

static void run_kernel(void *argument)
{
    struct kernel *kernel = argument;
    usleep(300);
    for (uint32_t block = 0; block < ROWS; block++)
        for (uint32_t head = 0; head < HEADS; head++) {
            char *run = kernel->at + (head * ROWS + block) * RUN;
            uint32_t round = kernel->fill ? (uint32_t)kernel->fill : rounds[kernel->first + block];
            uint32_t stamp = stamp_of(kernel->first + block, head, round);
            for (size_t i = 0; i < RUN; i += sizeof stamp) {
                if (kernel->fill)
                    memcpy(run + i, &stamp, sizeof stamp);
                CHECK(!memcmp(run + i, &stamp, sizeof stamp));
            }
        }
    free(kernel);
}

static void launch(struct bench *bench, struct pair *pair, uint32_t first, int fill)
{
    struct kernel *kernel = malloc(sizeof *kernel);
    CHECK(kernel);
    *kernel = (struct kernel){(char *)(uintptr_t)pair->device, first, fill};
    CHECK(!cuda.launch(bench->compute, run_kernel, kernel));
}

static uint64_t handle_of(cu_stream stream)
{
    return (uint64_t)(uintptr_t)stream;
}

/* D of the pair goes to the medium: kernel, copy out, write, each after the other. */
static void store(struct bench *bench, struct pair *pair, uint32_t first, int round)
{
    uint64_t stores = glue_copier_stream(bench->copier, GLUE_STORES);
    glue_piece piece = slot_piece(pair, first);
    glue_device_piece device = slot_on_device(pair);
    launch(bench, pair, first, round);
    renew(bench->copier, &pair->used);
    CHECK(!glue_event_record(pair->used, handle_of(bench->compute)));
    CHECK(!glue_copier_wait(bench->copier, stores, pair->used));
    CHECK(!glue_copier_copy(bench->copier, GLUE_TO_HOST, stores, &piece, &device, 1));
    renew(bench->copier, &pair->filled);
    CHECK(!glue_event_record(pair->filled, stores));
    CHECK(glue_submit_copied(bench->queue, GLUE_WRITE, first, &piece, 1, NULL, &pair->filled, 1) == 1);
    CHECK(reap_one(bench->queue).result == SLOT);
}

static void fill_medium(struct bench *bench, int round)
{
    for (uint32_t first = 0; first + ROWS <= BLOCKS; first += ROWS)
        store(bench, &bench->pairs[first / ROWS % PAIRS], first, round);
    CHECK(!cuda.synchronize(bench->compute));
    for (uint32_t block = 0; block < BLOCKS; block++)
        rounds[block] = (uint32_t)round;
}

/* Slots are filled again as soon as order allows: after the copy out of the host slot, and after the kernel
 * that reads the device slot. */
static int case_loads(void)
{
    glue_options options = options_of("mem");
    options.flags = GLUE_REORDER;
    options.seed = 5;
    options.latency_ns = 20000;
    struct bench bench = open_bench(&options);
    fill_medium(&bench, 1);
    unsigned seed = 3;
    for (int step = 0; step < STEPS; step++) {
        if (step % (STEPS / 4) == 0) /* copies slower than kernels, then faster */
            cuda.set(step % (STEPS / 2) ? 0 : 100, step % (STEPS / 2) ? 20 : 400, 0);
        struct pair *pair = &bench.pairs[step % PAIRS];
        uint32_t first = (uint32_t)rand_r(&seed) % (BLOCKS / ROWS - 1) * ROWS;
        glue_event *before = pair->filled;
        pair->filled = new_event(bench.copier);
        CHECK(!glue_copier_wait(bench.copier, glue_copier_stream(bench.copier, GLUE_LOADS), pair->used));
        CHECK(submit_read(&bench, pair, first, &before, 1) == 1);
        glue_event_release(before);
        CHECK(reap_one(bench.queue).result == SLOT);
        CHECK(!glue_copier_wait(bench.copier, handle_of(bench.compute), pair->filled));
        launch(&bench, pair, first, 0);
        renew(bench.copier, &pair->used);
        CHECK(!glue_event_record(pair->used, handle_of(bench.compute)));
    }
    close_bench(&bench);
    return 0;
}

static int case_stores(void)
{
    glue_options options = options_of("mem");
    struct bench bench = open_bench(&options);
    cuda.set(50, 200, 0);
    for (int round = 1; round <= 3; round++) {
        fill_medium(&bench, round);
        for (uint32_t first = 0; first + ROWS <= BLOCKS; first += ROWS) {
            struct pair *pair = &bench.pairs[0];
            CHECK(submit_read(&bench, pair, first, NULL, 0) == 1);
            CHECK(reap_one(bench.queue).result == SLOT);
            CHECK(!glue_copier_wait(bench.copier, handle_of(bench.compute), pair->filled));
            launch(&bench, pair, first, 0);
            CHECK(!cuda.synchronize(bench.compute));
        }
    }
    close_bench(&bench);
    return 0;
}

/* events ----------------------------------------------------------------------------------------- */

/* One that a transfer is to record is not done, and no stream waits for nothing. */
static int case_events(void)
{
    glue_options options = options_of("mem");
    options.latency_ns = 20000000;
    struct bench bench = open_bench(&options);
    struct pair *pair = &bench.pairs[0], *other = &bench.pairs[1];
    cuda.set(20000, 0, 0);
    CHECK(glue_events_done(&pair->filled, 1) == 1);
    CHECK(submit_read(&bench, pair, 0, NULL, 0) == 1);
    CHECK(glue_events_done(&pair->filled, 1) == 0);
    CHECK(glue_copier_wait(bench.copier, 0, pair->filled) == -EAGAIN);
    CHECK(glue_event_record(pair->filled, 0) == -EBUSY);
    CHECK(submit_read(&bench, pair, 0, NULL, 0) == -EBUSY);
    uint64_t begun = clock_ns();
    CHECK(submit_read(&bench, other, ROWS, &pair->filled, 1) == 1); /* waits for the copy, which is slow */
    CHECK(reap_one(bench.queue).tag == 0);
    CHECK(glue_events_done(&pair->filled, 1) == 0);
    CHECK(reap_one(bench.queue).tag == ROWS);
    CHECK(glue_events_done(&pair->filled, 1) == 1 && clock_ns() - begun > 60000000);
    wait_event(other->filled);
    close_bench(&bench);
    return 0;
}

static void expect_failure(struct bench *bench, uint32_t code)
{
    glue_completion done = reap_one(bench->queue);
    CHECK(done.result == -EIO && done.device_error == code && !done.memory_at_risk);
}

/* What was started of a transfer that failed is still under way. */
static void finish_loads(struct bench *bench)
{
    CHECK(!cuda.synchronize((cu_stream)(uintptr_t)glue_copier_stream(bench->copier, GLUE_LOADS)));
}

static void fails_and_goes_on(struct bench *bench, const char *call, int skip)
{
    struct pair *pair = &bench->pairs[0];
    cuda.fail(call, skip, 1, ILLEGAL_ADDRESS);
    CHECK(submit_read(bench, pair, 0, NULL, 0) == 1);
    expect_failure(bench, ILLEGAL_ADDRESS);
    finish_loads(bench);
    renew(bench->copier, &pair->filled);
    CHECK(submit_read(bench, pair, 0, NULL, 0) == 1);
    CHECK(reap_one(bench->queue).result == SLOT);
    wait_event(pair->filled);
}

static int case_errors(void)
{
    glue_options options = options_of("mem");
    struct bench bench = open_bench(&options);
    struct pair *pair = &bench.pairs[0];
    for (int skip = 0; skip < 3; skip++)
        fails_and_goes_on(&bench, "cuMemcpy2DAsync_v2", skip);
    fails_and_goes_on(&bench, "cuEventRecord", 0);
    fails_and_goes_on(&bench, "cuCtxPushCurrent_v2", 3);
    cuda.set(20000, 0, 0);
    CHECK(submit_read(&bench, pair, 0, NULL, 0) == 1);
    CHECK(reap_one(bench.queue).result == SLOT);
    cuda.fail("cuEventQuery", 0, 1, ILLEGAL_ADDRESS);
    CHECK(submit_read(&bench, &bench.pairs[1], ROWS, &pair->filled, 1) == 1);
    expect_failure(&bench, ILLEGAL_ADDRESS);
    CHECK(glue_events_done(&pair->filled, 1) == -EIO);
    glue_fault fault = {GLUE_FAULT_ERROR, GLUE_READ, 0, BLOCK, 0, 1, 2, 0x81};
    CHECK(!glue_queue_fault(bench.queue, &fault));
    renew(bench.copier, &pair->filled);
    CHECK(submit_read(&bench, pair, 0, NULL, 0) == 1);
    glue_completion done = reap_one(bench.queue);
    CHECK(done.result == -EIO && done.sct == 2 && !done.device_error);
    wait_event(pair->filled);
    struct pair outside = *pair;
    outside.host = bench.memory + PAIRS * SLOT - BLOCK;
    CHECK(submit_read(&bench, &outside, 0, NULL, 0) == -EFAULT);
    close_bench(&bench);
    return 0;
}

static int case_memory(void)
{
    glue_options options = options_of("mem");
    struct bench bench = open_bench(&options);
    uint64_t counts[7], more = 16 * 4096;
    int kind, error;
    char *memory = glue_memory_alloc(&more, 0, &kind, &error);
    uint64_t address = (uint64_t)(uintptr_t)memory;
    cuda.fail("cuMemHostRegister_v2", 2, 1, 2);
    CHECK(glue_copier_register(bench.copier, address, more, 4 * 4096) == -ENOMEM);
    CHECK(strstr(glue_copier_error(), "CUDA_ERROR_OUT_OF_MEMORY"));
    cuda.counts(counts);
    CHECK(counts[2] == PAIRS);
    CHECK(!glue_copier_register(bench.copier, address, more, 4 * 4096));
    CHECK(glue_copier_register(bench.copier, address, more, 4 * 4096) == -EEXIST);
    CHECK(glue_copier_register(bench.copier, address, more, 100) == -EINVAL);
    cuda.set(100000, 0, 0);
    glue_piece piece = plain_piece(0, memory, 4096);
    glue_device_piece device = {bench.device, 4096, 4096};
    CHECK(!glue_copier_copy(bench.copier, GLUE_TO_DEVICE, glue_copier_stream(bench.copier, GLUE_LOADS), &piece, &device, 1));
    CHECK(glue_copier_unregister(bench.copier, address, 1) == -EBUSY);
    CHECK(!glue_copier_unregister(bench.copier, address, 10000));
    cuda.counts(counts);
    CHECK(counts[2] == PAIRS);
    glue_memory_free(memory, more);
    close_bench(&bench);
    return 0;
}

/* closing ---------------------------------------------------------------------------------------- */

/* Transfers under way and held, copies under way: nothing touches memory afterwards. */
static int case_close(void)
{
    glue_options options = options_of("mem");
    struct bench bench = open_bench(&options);
    struct pair *pairs = bench.pairs;
    cuda.set(50000, 0, 0);
    CHECK(submit_read(&bench, &pairs[0], 0, NULL, 0) == 1);
    CHECK(reap_one(bench.queue).result == SLOT);
    CHECK(submit_read(&bench, &pairs[1], ROWS, &pairs[0].filled, 1) == 1);
    CHECK(submit_read(&bench, &pairs[2], 2 * ROWS, &pairs[1].filled, 1) == 1);
    CHECK(glue_queue_close(bench.queue) == 0);
    bench.queue = NULL;
    CHECK(glue_events_done(&pairs[2].filled, 1) == -EIO); /* nobody will record it */
    close_bench(&bench);
    return 0;
}

static int case_quarantine(void)
{
    glue_options options = options_of("mem");
    struct bench bench = open_bench(&options);
    cuda.set(200000, 0, 0);
    CHECK(submit_read(&bench, &bench.pairs[0], 0, NULL, 0) == 1);
    CHECK(reap_one(bench.queue).result == SLOT);
    CHECK(glue_copier_close(bench.copier, 1) == -EBUSY);
    CHECK(submit_read(&bench, &bench.pairs[1], 0, NULL, 0) == -ESHUTDOWN);
    CHECK(glue_copier_close(bench.copier, 1) == 0); /* a second time does nothing */
    CHECK(glue_queue_close(bench.queue) == 0);
    for (int i = 0; i < PAIRS; i++) {
        glue_event_release(bench.pairs[i].filled);
        glue_event_release(bench.pairs[i].used);
    }
    glue_copier_release(bench.copier);
    sleep(1); /* what is kept may still be written to */
    return 0;
}

static int case_refused(void)
{
    int error;
    load_emulator();
    CHECK(!glue_copier_open("/nowhere/libcuda.so.1", 0, &error) && error == -ENOTSUP);
    CHECK(!glue_copier_open(library(), 1, &error) && error == -ENODEV);
    static const char *const calls[] = {"cuInit", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuStreamCreate"};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        cuda.fail(calls[i], 0, 1, 2);
        CHECK(!glue_copier_open(library(), 0, &error) && error == -ENOMEM);
        CHECK(strstr(glue_copier_error(), calls[i]));
    }
    uint64_t counts[7];
    cuda.counts(counts);
    CHECK(!counts[1] && !counts[4]);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct test_case cases[] = {
        {"refused", case_refused}, {"memory", case_memory}, {"events", case_events},
        {"loads", case_loads},     {"stores", case_stores}, {"errors", case_errors},
        {"close", case_close},     {"quarantine", case_quarantine}, {NULL, NULL}};
    return run_cases(cases, argc, argv);
}
