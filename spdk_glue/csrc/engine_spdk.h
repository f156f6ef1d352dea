/* SPDX-License-Identifier: Apache-2.0 */
/* The engine over SPDK's driver: what its two files share. The I/O thread's alone, but for woken and sleeping. */
#ifndef GLUE_ENGINE_SPDK_H
#define GLUE_ENGINE_SPDK_H

#include "spdk_parts.h"

static const uint64_t MS = 1000000;

struct spdk_engine {
    struct controller controller;
    struct spdk_nvme_qpair *qpair;
    int wake_fd;
    atomic_int woken, sleeping;
    uint32_t timeout_ms, admin_timeout_ms, recoveries, depth;

    struct event *events; /* completed and not yet collected: room for every command */
    uint32_t num_events;
    struct command *oldest, *newest; /* what SPDK has, in the order of sending */
    struct command *unsent;          /* what it had no room for, or lost */

    uint64_t admin_due;   /* when the admin queue wants to be looked at */
    uint64_t abort_due;   /* when an abort should have helped; 0 none is under way */
    uint32_t aborts;      /* not answered */
    uint64_t last_write;  /* of those that no flush has covered; 0 none */
    int flushing, ns_changed, gone;
    int lost, silent; /* the connection or the controller; nothing answers at all */
    int dead;         /* -errno */
};

/* commands_spdk.c: -errno where SPDK did not take it. */
int send_command(struct spdk_engine *engine, struct command *command);
void send_unsent(struct spdk_engine *engine);
void keep_unsent(struct spdk_engine *engine, struct command *command);
void fail_command(struct spdk_engine *engine, struct command *command, int error, const struct spdk_nvme_cpl *why);
void add_event(struct spdk_engine *engine, struct event event);
int memory_fits(const struct spdk_engine *engine, const struct command *command);
int is_known(const struct spdk_engine *engine, int op);

#endif
