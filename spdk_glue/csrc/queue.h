/* SPDX-License-Identifier: Apache-2.0 */
/* The inside of a queue, shared by queue.c (callers' side) and io_thread.c (the engine's side). */
#ifndef QUEUE_H
#define QUEUE_H
#include <pthread.h>
#include <stdatomic.h>

#include "copies.h"
#include "engine.h"

struct transfer {
    struct transfer *next, *prev; /* submission order */
    uint64_t tag;
    int op;
    uint32_t count;
    glue_piece *pieces;
    uint32_t waits_for;      /* earlier transfers that touch the same bytes */
    /* how far commands were cut */
    uint32_t piece, block, head;
    uint64_t in_run;
    int cut_all;
    uint32_t in_flight;
    struct copies *copies; /* what ties it to a device, or NULL */
    int held;              /* until events of the device are done */
    glue_completion done;
};

struct transfer_list {
    struct transfer *first, *last;
};

struct glue_queue {
    const struct engine_ops *ops;
    void *engine;
    glue_options options;
    char *strings[5]; /* what the options point to */
    pthread_t thread;

    /* in force, at most what the options say; changed from any thread */
    _Atomic uint32_t depth, command_bytes;

    pthread_mutex_t lock; /* guards the fields down to `failed` */
    pthread_cond_t changed;
    struct transfer_list incoming;
    glue_completion *done; /* a ring of max_transfers */
    uint32_t done_head, done_count;
    uint32_t accepted; /* submitted and not yet reaped */
    int stopping, ready;
    int abandoned; /* whoever opened it waits no more: the I/O thread tidies up */
    int failed; /* -errno of an engine that can go on no more */
    glue_stats stats;

    /* the I/O thread's own */
    struct transfer_list active;
    struct command *commands, *free_commands;
    struct iovec *iovecs;
    unsigned iov_capacity;
    uint32_t in_flight, reads_in_flight, writes_in_flight;
    uint64_t bytes_in_flight, read_bytes_in_flight;
    uint64_t busy_since, read_since, write_since;
    int given_up;
    int held;         /* some transfer is */
    uint64_t ask_at;  /* the device again */
    int draining;     /* what arrives from here on is nobody's */
};

enum lane { LOADS, STORES };

/* What may be in flight. */
struct limit {
    uint32_t commands;
    uint64_t bytes;
};

void *io_thread(void *queue);
/* For the calling thread. */
void ask_for_short_slices(void);
int queue_memory(glue_queue *queue);
void queue_free(glue_queue *queue);
void list_append(struct transfer_list *list, struct transfer *transfer);
void list_remove(struct transfer_list *list, struct transfer *transfer);
void transfer_free(struct transfer *transfer);
/* The next command of a transfer: contiguous on the medium, within one piece, at most command_bytes. */
void command_cut(glue_queue *queue, struct transfer *transfer, struct command *command);
/* Skip what was moved, so that the same command goes on. */
void command_advance(struct command *command, uint64_t moved);

void in_flight_begin(glue_queue *queue, const struct command *command);
/* bytes: that it has moved. */
void in_flight_end(glue_queue *queue, const struct command *command, uint64_t bytes);
/* Is there room in the lane for one more command? */
int has_room(const glue_queue *queue, enum lane lane, struct limit limit);
/* stores: are there any to be started? */
struct limit limit_of_loads(const glue_queue *queue, int stores);
struct limit limit_of_stores(const glue_queue *queue);

static inline uint64_t piece_bytes(const glue_piece *piece)
{
    return piece->run_bytes * piece->heads * piece->blocks;
}

/* From its first byte on the medium to behind its last one. */
static inline uint64_t piece_span(const glue_piece *piece)
{
    if (!piece->medium_stride)
        return piece_bytes(piece);
    return (piece->heads - 1) * piece->medium_stride + piece->run_bytes;
}

#endif
