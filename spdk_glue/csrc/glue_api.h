/* SPDX-License-Identifier: Apache-2.0 */
/* The whole border between Python and C. The C compiler and cffi read this same file (cffi skips
 * the lines that begin with '#'), so the two cannot drift apart.
 *
 * Every int or int64_t result is 0, a count or -errno. No call holds Python's GIL. */
#ifndef GLUE_API_H
#define GLUE_API_H
#include <stdint.h>

typedef struct glue_queue glue_queue;

enum {
    GLUE_READ = 0,
    GLUE_WRITE = 1,
    GLUE_FLUSH = 2,    /* completes when every transfer submitted before it is durable */
    GLUE_REGISTER = 3, /* piece 0 names memory to register with the engine; result 1 done, 0 without */
    GLUE_UNREGISTER = 4
};

/* A strided piece of one transfer. On the medium it is contiguous from `offset`, in block order
 * and within a block in head order, each run `run_bytes` long. In memory, run (block b, head h)
 * begins at address + b * block_stride + h * head_stride. One plain buffer: heads = blocks = 1. */
typedef struct {
    uint64_t offset;        /* bytes from the start of the file or namespace */
    uint64_t address;
    uint64_t head_stride;   /* bytes */
    uint64_t block_stride;  /* bytes */
    uint64_t run_bytes;
    uint32_t heads;
    uint32_t blocks;
    uint32_t file;          /* index into the files the queue was opened with */
    uint32_t reserved;
} glue_piece;

/* What became of a transfer. A failed one carries the first failure: result is -errno, offset the
 * byte offset of the command that failed, sct and sc the NVMe status type and code where the
 * medium gave one (0/0 otherwise). */
typedef struct {
    uint64_t tag;
    int64_t result;
    uint64_t offset;
    uint16_t sct;
    uint16_t sc;
    uint32_t file;
} glue_completion;

typedef struct {
    const char *kind;        /* "uring", "posix", "mem" or "null" */
    const int *fds;          /* uring, posix: open files, still owned by the caller */
    uint32_t num_files;
    uint32_t queue_depth;    /* commands in flight */
    uint32_t command_bytes;  /* larger transfers are split at this size */
    uint32_t max_transfers;  /* transfers accepted and not yet reaped */
    uint32_t flags;
    uint32_t drain_ms;       /* what closing grants commands in flight */
    uint64_t capacity;       /* mem, null: bytes */
    uint64_t bandwidth;      /* mem: bytes a second, 0 for as fast as memory */
    uint64_t latency_ns;     /* mem: added to every command */
    uint64_t seed;           /* mem: with GLUE_REORDER, completions come in a shuffled order */
} glue_options;

enum {
    GLUE_REORDER = 1,  /* mem: shuffle completions */
    GLUE_WORKERS = 2   /* buffered files: a few workers copy in parallel (uring: workers of the kernel) */
};

typedef struct {
    uint64_t commands;
    uint64_t read_bytes;
    uint64_t write_bytes;
    uint64_t busy_ns;        /* time with at least one command in flight */
    uint64_t read_busy_ns;   /* the same, with at least one read in flight */
    uint64_t write_busy_ns;
    uint32_t max_in_flight;
    uint32_t registered;     /* bytes of memory registered with the engine, in MiB */
} glue_stats;

/* A scripted fault of the mem engine: the commands of `op` that touch [lo, hi) are counted; the
 * first `skip` pass, the next `count` fail. */
enum { GLUE_FAULT_ERROR = 0, GLUE_FAULT_TORN = 1, GLUE_FAULT_HANG = 2 };
typedef struct {
    uint32_t kind;  /* ERROR: nothing moves; TORN: the first half is stored, then an error; HANG: no answer */
    uint32_t op;
    uint64_t lo;
    uint64_t hi;
    uint32_t skip;
    uint32_t count;
    uint16_t sct;
    uint16_t sc;
} glue_fault;

typedef struct {
    uint64_t size;               /* bytes a file or block device holds */
    uint64_t fs_magic;           /* statfs f_type; 0 for a block device */
    uint32_t is_block_device;
    uint32_t is_regular;
    uint32_t encrypted;          /* fscrypt */
    uint32_t direct_refused;     /* the kernel says that O_DIRECT would be buffered here */
    uint32_t direct_alignment;   /* bytes O_DIRECT wants of offsets; 0 unknown */
    uint32_t memory_alignment;   /* bytes O_DIRECT wants of addresses; 0 unknown */
} glue_file_facts;

enum { GLUE_MEMORY_PLAIN = 0, GLUE_MEMORY_THP = 1, GLUE_MEMORY_HUGETLB = 2 };

/* What this build holds, e.g. "uring posix mem null". */
const char *glue_engines(void);

/* NULL on failure, with -errno in *error. */
glue_queue *glue_queue_open(const glue_options *options, int *error);
/* 1 accepted, 0 the queue is full: reap, then try again. The pieces are copied. A transfer starts
 * only after every earlier one that touches the same bytes, unless both read. */
int glue_submit(glue_queue *queue, int op, uint64_t tag, const glue_piece *pieces, uint32_t count);
/* Up to `max` completions into `out`; waits in the kernel until at least `min` are there or
 * timeout_ns has passed (negative: for ever). */
int glue_reap(glue_queue *queue, glue_completion *out, uint32_t max, uint32_t min, int64_t timeout_ns);
void glue_queue_stats(glue_queue *queue, glue_stats *out);
int glue_queue_fault(glue_queue *queue, const glue_fault *fault);
/* Gives up on what has not completed. Returns the number of transfers given up: their memory may
 * still be written by the medium, so the caller must keep it. */
int glue_queue_close(glue_queue *queue);

/* `size` is rounded up to the page in use, *kind says which page that is; NULL and *error on failure. */
void *glue_memory_alloc(uint64_t *size, int want_hugetlb, int *kind, int *error);
void glue_memory_free(void *address, uint64_t size);

int glue_file_facts_of(int fd, glue_file_facts *out);
/* Bytes of the file that the page cache holds, or -errno. */
int64_t glue_cached_bytes(int fd);

#endif
