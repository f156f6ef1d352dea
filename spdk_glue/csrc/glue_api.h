/* SPDX-License-Identifier: Apache-2.0 */
/* The whole border between Python and C. The C compiler and cffi read this same file (cffi skips
 * the lines that begin with '#'), so the two cannot drift apart.
 *
 * Every int or int64_t result is 0, a count or -errno. No call holds Python's GIL. */
#ifndef GLUE_API_H
#define GLUE_API_H
#include <stdint.h>

typedef struct glue_queue glue_queue;
typedef struct glue_copier glue_copier;
typedef struct glue_event glue_event;

enum {
    GLUE_READ = 0,
    GLUE_WRITE = 1,
    GLUE_TRIM = 2,     /* the medium may forget the pieces (NVMe: deallocate); they name no memory */
    GLUE_WRITE_BACK = 3, /* buffered files: begin to write dirty pages of the pieces to the medium, once what
                            was submitted before has been written; they name no memory, at most 1 GiB each */
    GLUE_FLUSH = 4,    /* completes when every transfer submitted before it is durable */
    GLUE_REGISTER = 5, /* piece 0 names memory to register with the engine; result 1 done, 0 without */
    GLUE_UNREGISTER = 6
};

/* A strided piece of one transfer. On the medium it is contiguous from `offset`, in block order
 * and within a block in head order, each run `run_bytes` long; or, where `medium_stride` is not 0, the
 * runs of its one block are that far apart. In memory, run (block b, head h) begins at
 * address + b * block_stride + h * head_stride. One plain buffer: heads = blocks = 1. */
typedef struct {
    uint64_t offset;        /* bytes from the start of the file or namespace */
    uint64_t address;
    uint64_t head_stride;   /* bytes */
    uint64_t block_stride;  /* bytes */
    uint64_t run_bytes;
    uint32_t heads;
    uint32_t blocks;        /* 1 where there is a medium_stride */
    uint64_t file;          /* index into the files the queue was opened with */
    uint64_t medium_stride; /* bytes from one head's run to the next one's, run_bytes at least; 0: contiguous */
} glue_piece;

/* Where the device has what a piece names in host memory: run (block b, head h) at
 * address + b * block_stride + h * head_stride. */
typedef struct {
    uint64_t address;
    uint64_t head_stride;
    uint64_t block_stride;
} glue_device_piece;

/* What a READ copies to a device: one device piece for each of its pieces. The event is recorded on
 * `stream` behind the last copy; until then it is neither done nor may a stream wait for it. */
typedef struct {
    glue_copier *copier;
    uint64_t stream;
    const glue_device_piece *pieces;
    glue_event *event;
} glue_copies;

/* A GPU. host_pointers: kernels may use registered host memory at its own address. */
typedef struct {
    char name[96];
    uint32_t integrated; /* its memory is the machine's */
    uint32_t host_pointers;
} glue_gpu;

enum { GLUE_TO_DEVICE = 0, GLUE_TO_HOST = 1 };
enum { GLUE_LOADS = 0, GLUE_STORES = 1 }; /* the copier's own streams */

/* What became of a transfer. A failed one carries the first failure: result is -errno, offset the
 * byte offset of the command that failed, sct and sc the NVMe status type and code where the
 * medium gave one (0/0 otherwise). memory_at_risk: the medium did not confirm that it let go of the
 * transfer's memory, so the caller must never use that memory for anything else. */
typedef struct {
    uint64_t tag;
    int64_t result;
    uint64_t offset;
    uint16_t sct;
    uint16_t sc;
    uint32_t file;
    uint32_t memory_at_risk;
    uint64_t begun_ns; /* CLOCK_MONOTONIC, when its first command was sent */
    uint64_t ended_ns; /* and when its last one had completed */
    uint32_t device_error; /* what the device's driver answered where a copy could not be started, else 0 */
    uint32_t reserved;
} glue_completion;

typedef struct {
    const char *kind;        /* "uring", "uring_cmd", "posix", "spdk", "mem" or "null" */
    const int *fds;          /* uring, posix: open files, still owned by the caller; uring_cmd: one device */
    uint32_t num_files;
    uint32_t queue_depth;    /* commands in flight; an engine may raise it, with smaller commands */
    uint32_t command_bytes;  /* larger transfers are split at this size; an engine may lower it */
    uint32_t max_transfers;  /* transfers accepted and not yet reaped */
    uint32_t flags;
    uint32_t drain_ms;       /* what closing grants commands in flight */
    uint64_t in_flight_bytes; /* that commands in flight move, together; 0 for what queue_depth says */
    uint64_t capacity;       /* mem, null: bytes */
    uint64_t bandwidth;      /* mem: bytes a second, 0 for as fast as memory */
    uint64_t latency_ns;     /* mem: added to every command */
    uint64_t seed;           /* mem: with GLUE_REORDER, completions come in a shuffled order */
    const char *target;      /* spdk: a transport id as spdk_nvme_transport_id_parse() reads it */
    const char *hostnqn;     /* spdk: who we say we are, or NULL for a random name */
    const char *dhchap_key;  /* spdk: what DH-HMAC-CHAP proves us with ("DHHC-1:..."), or NULL */
    const char *dhchap_ctrlr_key; /* spdk: what the controller must prove itself with, or NULL */
    const char *tls_psk;     /* spdk: a TLS pre-shared key ("NVMeTLSkey-1:..."), or NULL */
    uint32_t nsid;           /* spdk: namespace, from 1 */
    uint32_t timeout_ms;     /* spdk: what one command may take before it is aborted */
    uint32_t admin_timeout_ms; /* spdk: the same for an admin command */
    uint32_t open_ms;        /* what opening may take, 0 for ever */
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
    uint64_t cpu_ns;         /* CPU time of the I/O thread */
} glue_stats;

/* What an NVMe namespace says of itself. */
typedef struct {
    uint64_t bytes;
    uint32_t lba_bytes;
    uint32_t max_command_bytes;
    uint32_t volatile_cache; /* writes are durable only after a flush */
    uint32_t can_trim;
    uint32_t any_memory;     /* transfers may use memory that is not the env's */
    uint32_t recoveries;     /* times the connection or the controller was brought back */
    char transport[16];
    char serial[24];
    char model[44];
    char firmware[12];
    char uuid[40];           /* empty where it has none */
} glue_medium;

/* SPDK's environment: one for the life of the process. */
typedef struct {
    uint64_t bytes;     /* of memory for buffers, reserved at once and never more */
    uint32_t hugepages; /* 1: take reserved hugepages, 0: ordinary memory */
    uint32_t pci;       /* 1: PCI devices can be used */
} glue_env_options;

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

typedef struct { /* of one file, in bytes; before Linux 6.5 `cached` alone is known */
    uint64_t cached;
    uint64_t dirty;   /* of `cached`: not on the medium yet, or on its way */
    uint64_t evicted; /* dropped for want of memory a short while ago */
} glue_cached;

enum { GLUE_MEMORY_PLAIN = 0, GLUE_MEMORY_THP = 1, GLUE_MEMORY_HUGETLB = 2 };

/* Once, when the module has been loaded: undoes what a library did to the process by being loaded. */
void glue_loaded(void);
/* What this build holds, e.g. "uring uring_cmd posix mem null". */
const char *glue_engines(void);
/* SPDK's version, e.g. "26.05", or "" in a build without it. */
const char *glue_spdk_version(void);

/* 0; -EALREADY where it is there; -ENOTSUP in a build without SPDK. */
int glue_env_start(const glue_env_options *options);
/* Zeroed memory of the environment, or NULL with -errno in *error. */
void *glue_env_alloc(uint64_t size, int *error);
void glue_env_free(void *address);
/* What the libraries have logged since the last call, oldest first: whole lines, ended by a zero.
 * The number of bytes. */
int glue_log_take(char *out, uint32_t size);

/* NULL on failure, with -errno in *error. */
glue_queue *glue_queue_open(const glue_options *options, int *error);
/* 1 accepted, 0 the queue is full: reap, then try again. The pieces are copied. A transfer starts
 * only after every earlier one that touches the same bytes, unless both read. */
int glue_submit(glue_queue *queue, int op, uint64_t tag, const glue_piece *pieces, uint32_t count);
/* The same for a transfer that is tied to copies. copies: NULL, or of a READ: each command that has
 * completed starts its part of the copies to the device, and when all have, the event is recorded behind
 * them; the completion comes then, not when they have finished. after: the transfer starts when these
 * events are done; one that failed fails it. The queue keeps what it needs of both. */
int glue_submit_copied(glue_queue *queue, int op, uint64_t tag, const glue_piece *pieces, uint32_t count,
                       const glue_copies *copies, glue_event *const *after, uint32_t num_after);
/* Up to `max` completions into `out`; waits in the kernel until at least `min` are there or
 * timeout_ns has passed (negative: for ever). */
int glue_reap(glue_queue *queue, glue_completion *out, uint32_t max, uint32_t min, int64_t timeout_ns);
void glue_queue_stats(glue_queue *queue, glue_stats *out);
/* -ENOTSUP where the engine has none. */
int glue_queue_medium(glue_queue *queue, glue_medium *out);
/* As they are in force: queue_depth and command_bytes. */
void glue_queue_options(glue_queue *queue, uint32_t *queue_depth, uint32_t *command_bytes);
/* Other ones from now on, at most those the queue was opened with: 0 or -EINVAL. From any thread. */
int glue_queue_tune(glue_queue *queue, uint32_t queue_depth, uint32_t command_bytes);
int glue_queue_fault(glue_queue *queue, const glue_fault *fault);
/* Gives up on what has not completed. Returns the number of transfers given up: their memory may
 * still be written by the medium, so the caller must keep it. */
int glue_queue_close(glue_queue *queue);

/* A copier moves bytes between host memory and one CUDA device, in the context that every other user of the
 * device in this process has (its primary one). Streams are the driver's handles; 0 is the default stream.
 * Nothing here waits for the device but glue_copier_close and _unregister. Where a call fails,
 * glue_copier_error() says what the driver answered to this thread.
 *
 * library: the driver's, or NULL to look for libcuda.so.1. NULL and -ENOTSUP where there is none. */
glue_copier *glue_copier_open(const char *library, int ordinal, int *error);
void glue_copier_gpu(const glue_copier *copier, glue_gpu *out);
uint64_t glue_copier_stream(const glue_copier *copier, int which);
/* Pins host memory for copies, `chunk` bytes a call (a page's multiple); all of it or nothing. No copy may
 * reach over the end of a chunk. */
int glue_copier_register(glue_copier *copier, uint64_t address, uint64_t bytes, uint64_t chunk);
/* Waits up to timeout_ms for the copies under way. -EBUSY where they do not end: the memory stays pinned
 * and must be kept. */
int glue_copier_unregister(glue_copier *copier, uint64_t address, uint32_t timeout_ms);
/* The address that kernels use for registered host memory. */
int glue_copier_device_address(glue_copier *copier, uint64_t host, uint64_t *device);
/* Starts copies; the pieces' `offset` and `file` mean nothing. -EFAULT for memory that is not registered. */
int glue_copier_copy(glue_copier *copier, int direction, uint64_t stream, const glue_piece *pieces,
                     const glue_device_piece *device, uint32_t count);
/* Work that is put on the stream from now on starts after the event. -EAGAIN where it is not recorded yet. */
int glue_copier_wait(glue_copier *copier, uint64_t stream, glue_event *event);
/* From here on every copy fails. Waits up to timeout_ms for those under way, then lets go of everything.
 * 0, or -EBUSY where they do not end: registered and device memory must be kept for ever. */
int glue_copier_close(glue_copier *copier, uint32_t timeout_ms);
/* The caller's reference; events and transfers have their own. */
void glue_copier_release(glue_copier *copier);
/* Events that are neither released nor in the copier's store of free ones; bytes that are registered. */
void glue_copier_counts(glue_copier *copier, uint32_t *events, uint64_t *registered);
const char *glue_copier_error(void);
/* The driver's name of one of its errors. */
const char *glue_copier_error_name(const glue_copier *copier, uint32_t error);

/* A new event is done. */
glue_event *glue_event_new(glue_copier *copier, int *error);
void glue_event_release(glue_event *event);
int glue_event_record(glue_event *event, uint64_t stream);
/* How many of the first events, up to one that is not, are done; -errno where that one failed. */
int glue_events_done(glue_event *const *events, uint32_t count);

/* `size` is rounded up to the page in use, *kind says which page that is, at best `best`; NULL and *error on
 * failure. */
void *glue_memory_alloc(uint64_t *size, int best, int *kind, int *error);
void glue_memory_free(void *address, uint64_t size);
/* How many of the bytes, whole pages of 4 KiB, are in memory now; or -errno. */
int64_t glue_resident(uint64_t address, uint64_t bytes);

int glue_file_facts_of(int fd, glue_file_facts *out);
/* What the page cache holds of the file; 0 or -errno. */
int glue_cached_pages(int fd, glue_cached *out);
/* Give back a range of the file, its pages and its blocks: it reads as zeros. 0 or -errno. */
int glue_punch(int fd, uint64_t offset, uint64_t bytes);
/* Could the kernel not write a dirty page of the file since this was asked last? 0, or -errno, told once: such
 * pages count as clean, are dropped some time, and then read without an error as what the medium had before. */
int glue_lost_writes(int fd);
/* Of memory that maps a file: make `runs` ranges present, each `bytes` long, `stride` apart. Returns the bytes
 * that were not, or -errno: -EIO where the file cannot be read, and a touch would raise SIGBUS. Of ranges at
 * most 64 KiB apart, what lies between them counts, too. */
int64_t glue_populate(uint64_t address, uint64_t bytes, uint64_t stride, uint32_t runs);
/* The same, without waiting for it. */
int64_t glue_read_ahead(uint64_t address, uint64_t bytes, uint64_t stride, uint32_t runs);
/* One such range, and page-table entries for all of it, so that no touch takes a fault. 0 or -errno. */
int glue_prefault(uint64_t address, uint64_t bytes);
/* What stderr gets before the process ends with 1, should a mapped page be lost in between; not where the
 * process has a handler of its own for SIGBUS. The first text stays. -EINVAL over 512 bytes. */
int glue_on_lost_page(const char *text);

#endif
