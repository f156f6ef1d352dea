/* SPDX-License-Identifier: Apache-2.0 */
/* Ordinary files and block devices through threads that call preadv and pwritev: for machines where
 * io_uring is forbidden or was not there at build time. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "engine.h"

enum {
    MAX_THREADS = 16, /* they sleep while the drive works */
    MAX_COPIERS = 4,  /* these copy out of the page cache, beside the threads that compute */
    STACK_BYTES = 512 << 10, /* below 2 MiB, so that no stack becomes a transparent hugepage */
};

struct posix_engine {
    pthread_mutex_t lock; /* guards the fields down to `stopping` */
    pthread_cond_t work, answered;
    struct command *first, *last; /* submitted, and with no worker yet */
    struct event *done;           /* a ring of `depth` */
    unsigned done_head, num_done;
    int woken, stopping;

    unsigned depth, num_files, num_threads;
    int *fds; /* our own: a number that the caller closes could become another file's */
    pthread_t threads[MAX_THREADS];
};

/* Where the kernel knows no such call it writes pages back when it likes. */
static int begin_write_back(int fd, const struct command *command)
{
    int error = sync_file_range(fd, (off_t)command->offset, (off_t)command->span, SYNC_FILE_RANGE_WRITE);
    return error && errno == ENOSYS ? 0 : error;
}

static int64_t carry_out(const struct posix_engine *engine, const struct command *command)
{
    int fd = engine->fds[command->file];
    const struct iovec *iov = &command->iov[command->first];
    ssize_t moved;
    if (command->op == GLUE_FLUSH)
        moved = fdatasync(fd);
    else if (command->op == GLUE_WRITE_BACK)
        moved = begin_write_back(fd, command);
    else if (command->op == GLUE_READ)
        moved = preadv(fd, iov, (int)command->niov, (off_t)command->offset);
    else
        moved = pwritev(fd, iov, (int)command->niov, (off_t)command->offset);
    return moved < 0 ? -errno : moved;
}

/* NULL once the engine closes; what no worker has begun by then is left. */
static struct command *next_command(struct posix_engine *engine)
{
    while (!engine->first && !engine->stopping)
        pthread_cond_wait(&engine->work, &engine->lock);
    if (engine->stopping)
        return NULL;
    struct command *command = engine->first;
    engine->first = command->next;
    return command;
}

static void *worker(void *argument)
{
    struct posix_engine *engine = argument;
    struct command *command;
    pthread_mutex_lock(&engine->lock);
    while ((command = next_command(engine))) {
        pthread_mutex_unlock(&engine->lock);
        int64_t result = carry_out(engine, command);
        pthread_mutex_lock(&engine->lock);
        unsigned at = (engine->done_head + engine->num_done++) % engine->depth;
        engine->done[at] = (struct event){.command = command, .result = result};
        pthread_cond_signal(&engine->answered);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* Waits for the calls under way: they cannot be taken back. */
static void posix_close(void *self)
{
    struct posix_engine *engine = self;
    pthread_mutex_lock(&engine->lock);
    engine->stopping = 1;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (unsigned i = 0; i < engine->num_threads; i++)
        pthread_join(engine->threads[i], NULL);
    for (unsigned i = 0; i < engine->num_files; i++)
        close(engine->fds[i]);
    pthread_mutex_destroy(&engine->lock);
    pthread_cond_destroy(&engine->work);
    pthread_cond_destroy(&engine->answered);
    free(engine->done);
    free(engine->fds);
    free(engine);
}

static int take_files(struct posix_engine *engine, const glue_options *options)
{
    for (; engine->num_files < options->num_files; engine->num_files++) {
        int fd = fcntl(options->fds[engine->num_files], F_DUPFD_CLOEXEC, 3);
        if (fd < 0)
            return -errno;
        engine->fds[engine->num_files] = fd;
    }
    return options->num_files ? 0 : -EINVAL;
}

/* Fewer threads than wished for are slower, not wrong. */
static int start_threads(struct posix_engine *engine, const glue_options *options)
{
    unsigned wanted = options->flags & GLUE_WORKERS ? MAX_COPIERS : MAX_THREADS;
    wanted = wanted < engine->depth ? wanted : engine->depth;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK_BYTES);
    int error = 0;
    while (!error && engine->num_threads < wanted) {
        error = pthread_create(&engine->threads[engine->num_threads], &small, worker, engine);
        engine->num_threads += !error;
    }
    pthread_attr_destroy(&small);
    return engine->num_threads ? 0 : -error;
}

static int posix_open(void **self, glue_options *options)
{
    struct posix_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, NULL);
    cond_init_monotonic(&engine->answered);
    engine->depth = options->queue_depth;
    engine->done = calloc(engine->depth, sizeof *engine->done);
    engine->fds = calloc(options->num_files, sizeof *engine->fds);
    int error = engine->done && engine->fds ? take_files(engine, options) : -ENOMEM;
    if (!error)
        error = start_threads(engine, options);
    if (error) {
        posix_close(engine);
        return error;
    }
    *self = engine;
    return 0;
}

static int posix_submit(void *self, struct command *command)
{
    struct posix_engine *engine = self;
    command->next = NULL;
    pthread_mutex_lock(&engine->lock);
    if (engine->first)
        engine->last->next = command;
    else
        engine->first = command;
    engine->last = command;
    pthread_cond_signal(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    return 0;
}

static void sleep_until_answered(struct posix_engine *engine, int64_t timeout_ns)
{
    struct timespec deadline = deadline_after(timeout_ns);
    while (!engine->num_done && !engine->woken) {
        if (timeout_ns < 0)
            pthread_cond_wait(&engine->answered, &engine->lock);
        else if (pthread_cond_timedwait(&engine->answered, &engine->lock, &deadline) == ETIMEDOUT)
            break;
    }
    engine->woken = 0;
}

static int posix_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns)
{
    struct posix_engine *engine = self;
    unsigned count = 0;
    pthread_mutex_lock(&engine->lock);
    sleep_until_answered(engine, timeout_ns);
    for (; count < max && engine->num_done; count++, engine->num_done--) {
        out[count] = engine->done[engine->done_head];
        engine->done_head = (engine->done_head + 1) % engine->depth;
    }
    pthread_mutex_unlock(&engine->lock);
    return (int)count;
}

static void posix_wake(void *self)
{
    struct posix_engine *engine = self;
    pthread_mutex_lock(&engine->lock);
    engine->woken = 1;
    pthread_cond_signal(&engine->answered);
    pthread_mutex_unlock(&engine->lock);
}

const struct engine_ops engine_posix = {
    .name = "posix",
    .writes_back = 1,
    .open = posix_open,
    .submit = posix_submit,
    .wait = posix_wait,
    .wake = posix_wake,
    .close = posix_close,
};
