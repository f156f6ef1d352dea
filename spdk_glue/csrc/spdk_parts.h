/* SPDX-License-Identifier: Apache-2.0 */
/* What env_spdk.c, keys_spdk.c, controller_spdk.c and engine_spdk.c share. */
#ifndef SPDK_PARTS_H
#define SPDK_PARTS_H
#include <spdk/env.h>
#include <spdk/log.h>
#include <spdk/nvme.h>
#include <spdk/version.h>
#include <stdatomic.h>

#include "engine.h"

/* env_spdk.c */
int env_is_ours(void);
int env_holds(uint64_t address, uint64_t bytes);
void env_watch_registers(volatile void *registers);
void env_unwatch_registers(volatile void *registers);

/* keys_spdk.c: NULL where there is no text or no memory; put back with spdk_keyring_put_key(). */
struct spdk_key *key_of(const char *text);

/* controller_spdk.c: one connection and one namespace, with what identified it when it was opened. */
struct controller {
    struct spdk_nvme_transport_id id;
    struct spdk_nvme_ctrlr *ctrlr;
    struct spdk_nvme_ns *ns;
    struct spdk_key *keys[3];
    uint32_t nsid, lba_bytes, admin_timeout_ms;
    uint64_t bytes;
    struct spdk_uuid uuid;
    char serial[SPDK_NVME_CTRLR_SN_LEN + 1];
    int has_uuid, volatile_cache, fabric, local_memory;
    int watched;           /* vfio-user: the target's socket is listed by the kernel while it lives */
    volatile void *registers;
    struct controller *next;
};

/* 0 or -errno; the log has the reason. */
int controller_open(struct controller *controller, const glue_options *options);
/* 1 where the namespace is there and is the one that was opened. */
int controller_is_same(const struct controller *controller);
/* vfio-user: 0 once the target's process is gone. */
int controller_target_lives(const struct controller *controller);
/* Reset, or reconnect: afterwards no command from before can touch memory. 0 or -errno. */
int controller_reset(struct controller *controller);
/* silent: it does not answer, so it is not told. */
void controller_close(struct controller *controller, int silent);
void controller_medium(const struct controller *controller, glue_medium *out);
struct spdk_nvme_qpair *controller_qpair(const struct controller *controller, uint32_t depth);

#endif
