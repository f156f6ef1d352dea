/* SPDX-License-Identifier: Apache-2.0 */
/* SPDK's environment: DPDK's memory and logs, once for the life of the process, and without what
 * they would do to the rest of it: no pinned thread, no signal handler, nothing on stderr. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <rte_eal.h>
#include <rte_log.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sigbus.h"
#include "spdk_parts.h"

/* log ---------------------------------------------------------------------------------------- */

enum { LOG_BYTES = 16384, LINE_BYTES = 512 };
static struct {
    pthread_mutex_t lock;
    char text[LOG_BYTES];
    unsigned used;
} captured = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The oldest lines give way. */
static void log_append(const char *text, size_t bytes)
{
    pthread_mutex_lock(&captured.lock);
    if (bytes > LOG_BYTES / 2)
        bytes = LOG_BYTES / 2;
    if (captured.used + bytes > LOG_BYTES) {
        unsigned drop = captured.used + (unsigned)bytes - LOG_BYTES;
        const char *end = memchr(captured.text + drop, '\n', captured.used - drop);
        drop = end ? (unsigned)(end + 1 - captured.text) : captured.used;
        memmove(captured.text, captured.text + drop, captured.used - drop);
        captured.used -= drop;
    }
    memcpy(captured.text + captured.used, text, bytes);
    captured.used += (unsigned)bytes;
    pthread_mutex_unlock(&captured.lock);
}

int glue_log_take(char *out, uint32_t size)
{
    if (!size)
        return -EINVAL;
    pthread_mutex_lock(&captured.lock);
    unsigned bytes = captured.used < size - 1 ? captured.used : size - 1;
    memcpy(out, captured.text + captured.used - bytes, bytes);
    out[bytes] = 0;
    captured.used = 0;
    pthread_mutex_unlock(&captured.lock);
    return (int)bytes;
}

static void on_spdk_log(int level, const char *file, const int line, const char *function, const char *format,
                        va_list arguments)
{
    (void)file, (void)line, (void)function;
    char text[LINE_BYTES];
    if (level > SPDK_LOG_WARN)
        return;
    int bytes = vsnprintf(text, sizeof text, format, arguments);
    if (bytes > 0)
        log_append(text, (size_t)bytes < sizeof text ? (size_t)bytes : sizeof text - 1);
}

static ssize_t on_dpdk_log(void *cookie, const char *text, size_t bytes)
{
    (void)cookie;
    log_append(text, bytes);
    return (ssize_t)bytes;
}

static void capture_logs(void)
{
    spdk_log_open(on_spdk_log);
    FILE *stream = fopencookie(NULL, "w", (cookie_io_functions_t){.write = on_dpdk_log});
    if (stream) {
        setvbuf(stream, NULL, _IOLBF, LINE_BYTES);
        rte_openlog_stream(stream);
    }
}

/* SIGBUS ------------------------------------------------------------------------------------- */

/* SPDK's constructor takes SIGBUS for good, and its handler returns: a fault that is not its own
 * (a truncated file that is mapped, hugepages that ran out) would repeat for ever. So whoever had the signal
 * keeps it, and SPDK's handler sees faults inside a controller's registers alone. */
enum { MAX_BARS = 16 };
static const uint64_t BAR_BYTES = 64 << 10; /* registers and the doorbells of 7680 queue pairs */
static struct sigaction before_spdk, of_spdk;
static volatile uint64_t bars[MAX_BARS];

__attribute__((constructor(101))) static void remember_sigbus(void)
{
    sigaction(SIGBUS, NULL, &before_spdk);
}

void glue_loaded(void)
{
    if (of_spdk.sa_sigaction)
        return;
    sigaction(SIGBUS, &before_spdk, &of_spdk);
}

int env_took_sigbus(int number, siginfo_t *info, void *context)
{
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    for (unsigned i = 0; i < MAX_BARS; i++) {
        if (bars[i] && address >= bars[i] && address < bars[i] + BAR_BYTES) {
            of_spdk.sa_sigaction(number, info, context);
            return 1;
        }
    }
    return 0;
}

void env_watch_registers(volatile void *registers)
{
    sigbus_take();
    for (unsigned i = 0; i < MAX_BARS; i++) {
        if (!bars[i]) {
            bars[i] = (uint64_t)(uintptr_t)registers;
            return;
        }
    }
}

void env_unwatch_registers(volatile void *registers)
{
    for (unsigned i = 0; i < MAX_BARS; i++)
        if (bars[i] == (uint64_t)(uintptr_t)registers)
            bars[i] = 0;
}

/* start -------------------------------------------------------------------------------------- */

static pthread_mutex_t env_lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t env_pid;

/* "0@(0,2,3)": one logical core that may run on any CPU of this process, so nobody is pinned. */
static void lcore_map(char *out, size_t size)
{
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    sched_getaffinity(0, sizeof allowed, &allowed);
    size_t at = (size_t)snprintf(out, size, "0@(");
    const char *comma = "";
    for (unsigned cpu = 0; cpu < CPU_SETSIZE && at + 8 < size; cpu++) {
        if (!CPU_ISSET(cpu, &allowed))
            continue;
        at += (size_t)snprintf(out + at, size - at, "%s%u", comma, cpu);
        comma = ",";
    }
    snprintf(out + at, size - at, ")");
}

static int start(const glue_env_options *wanted)
{
    char cores[4096], context[96];
    struct spdk_env_opts options;
    memset(&options, 0, sizeof options);
    options.opts_size = sizeof options;
    spdk_env_opts_init(&options);
    lcore_map(cores, sizeof cores);
    uint64_t mib = (wanted->bytes + (1 << 20) - 1) >> 20;
    options.name = "dualblade";
    options.core_mask = NULL;
    options.lcore_map = cores;
    options.shm_id = -1;
    options.mem_size = (int)mib;
    options.no_pci = !wanted->pci;
    options.no_huge = !wanted->hugepages;
    options.hugepage_single_segments = wanted->hugepages != 0;
    /* A vfio-user controller maps 16 regions at most, and each growth is one: so there is no growth. */
    snprintf(context, sizeof context, "--in-memory --socket-limit=%llu", (unsigned long long)mib);
    if (wanted->hugepages)
        options.env_context = context;
    capture_logs();
    int error = spdk_env_init(&options);
    if (!error)
        rmdir(rte_eal_get_runtime_dir());
    return error;
}

struct start_call {
    const glue_env_options *options;
    int result;
};

static void *start_thread(void *argument)
{
    struct start_call *call = argument;
    call->result = start(call->options);
    return NULL;
}

int glue_env_start(const glue_env_options *options)
{
    pthread_t helper;
    struct start_call call = {options, 0};
    if (!options->bytes || options->bytes >> 50)
        return -EINVAL;
    pthread_mutex_lock(&env_lock);
    int error = env_pid ? -EALREADY : -pthread_create(&helper, NULL, start_thread, &call);
    if (!error) {
        pthread_join(helper, NULL);
        error = call.result;
    }
    if (!error)
        env_pid = getpid();
    pthread_mutex_unlock(&env_lock);
    return error;
}

int env_is_ours(void)
{
    return env_pid && env_pid == getpid();
}

const char *glue_spdk_version(void)
{
    static char version[16];
    snprintf(version, sizeof version, "%d.%02d", SPDK_VERSION_MAJOR, SPDK_VERSION_MINOR);
    return version;
}

/* memory ------------------------------------------------------------------------------------- */

enum { MAX_BLOCKS = 256 };
static struct block {
    uint64_t address, bytes;
} blocks[MAX_BLOCKS];

static int remember_block(void *address, uint64_t bytes)
{
    for (unsigned i = 0; i < MAX_BLOCKS; i++) {
        if (blocks[i].bytes)
            continue;
        blocks[i].address = (uint64_t)(uintptr_t)address;
        __atomic_store_n(&blocks[i].bytes, bytes, __ATOMIC_RELEASE);
        return 0;
    }
    return -ENOMEM;
}

void *glue_env_alloc(uint64_t size, int *error)
{
    const uint64_t huge = 2 << 20;
    *error = env_is_ours() ? 0 : -ECHILD;
    if (*error)
        return NULL;
    void *address = spdk_zmalloc(size, size < huge ? 4096 : huge, NULL, -1, SPDK_MALLOC_DMA);
    pthread_mutex_lock(&env_lock);
    *error = address ? remember_block(address, size) : -ENOMEM;
    pthread_mutex_unlock(&env_lock);
    if (*error && address) {
        spdk_free(address);
        address = NULL;
    }
    return address;
}

/* A forked child shares the heap with its parent: what it freed would be handed out twice. */
void glue_env_free(void *address)
{
    if (!env_is_ours())
        return;
    pthread_mutex_lock(&env_lock);
    for (unsigned i = 0; i < MAX_BLOCKS; i++)
        if (blocks[i].bytes && blocks[i].address == (uint64_t)(uintptr_t)address)
            __atomic_store_n(&blocks[i].bytes, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&env_lock);
    spdk_free(address);
}

/* Called for every segment of every command: no lock. A block that goes while it is in use is its user's fault. */
int env_holds(uint64_t address, uint64_t bytes)
{
    for (unsigned i = 0; i < MAX_BLOCKS; i++) {
        uint64_t size = __atomic_load_n(&blocks[i].bytes, __ATOMIC_ACQUIRE);
        if (size && address >= blocks[i].address && address + bytes <= blocks[i].address + size)
            return 1;
    }
    return 0;
}
