/* SPDX-License-Identifier: Apache-2.0 */
/* One controller behind SPDK's NVMe driver: connect, identify, bring back, let go. */
#include <errno.h>
#include <pthread.h>
#include <spdk/keyring.h>
#include <spdk/uuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "spdk_parts.h"

/* SPDK gives a second connect the first one's controller: two owners of one reset would meet. */
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static struct controller *in_use;

static int claim(struct controller *controller)
{
    int error = 0;
    pthread_mutex_lock(&list_lock);
    for (const struct controller *other = in_use; other; other = other->next)
        if (!spdk_nvme_transport_id_compare(&other->id, &controller->id))
            error = -EBUSY;
    if (!error) {
        controller->next = in_use;
        in_use = controller;
    }
    pthread_mutex_unlock(&list_lock);
    return error;
}

static void unclaim(struct controller *controller)
{
    pthread_mutex_lock(&list_lock);
    for (struct controller **at = &in_use; *at; at = &(*at)->next) {
        if (*at == controller) {
            *at = controller->next;
            break;
        }
    }
    pthread_mutex_unlock(&list_lock);
}

static int take_keys(struct controller *controller, const glue_options *options, struct spdk_nvme_ctrlr_opts *out)
{
    const char *texts[] = {options->dhchap_key, options->dhchap_ctrlr_key, options->tls_psk};
    for (unsigned i = 0; i < 3; i++) {
        controller->keys[i] = key_of(texts[i]);
        if (texts[i] && !controller->keys[i])
            return -EINVAL;
    }
    out->dhchap_key = controller->keys[0];
    out->dhchap_ctrlr_key = controller->keys[1];
    out->tls_psk = controller->keys[2];
    return 0;
}

static void put_keys(struct controller *controller)
{
    for (unsigned i = 0; i < 3; i++)
        spdk_keyring_put_key(controller->keys[i]);
}

static int connect_to(struct controller *controller, const glue_options *options)
{
    struct spdk_nvme_ctrlr_opts wanted;
    spdk_nvme_ctrlr_get_default_ctrlr_opts(&wanted, sizeof wanted);
    wanted.admin_timeout_ms = controller->admin_timeout_ms;
    wanted.fabrics_connect_timeout_us = controller->admin_timeout_ms * 1000ull;
    wanted.disable_error_logging = true; /* what fails is told once, by us */
    if (options->hostnqn)
        snprintf(wanted.hostnqn, sizeof wanted.hostnqn, "%s", options->hostnqn);
    int error = take_keys(controller, options, &wanted);
    if (error)
        return error;
    controller->ctrlr = spdk_nvme_connect(&controller->id, &wanted, sizeof wanted);
    return controller->ctrlr ? 0 : -ENOTCONN;
}

static void trimmed(char *out, size_t size, const void *from, size_t bytes)
{
    size_t used = bytes < size - 1 ? bytes : size - 1;
    memcpy(out, from, used);
    while (used && (out[used - 1] == ' ' || !out[used - 1]))
        used--;
    out[used] = 0;
}

static int is_vfio_user(const struct controller *controller)
{
    return controller->id.trtype == SPDK_NVME_TRANSPORT_VFIOUSER;
}

/* The kernel lists a listening socket while its process lives: the only sign of life of a vfio-user
 * target that can be had without asking it, for an ask may never be answered. */
static int socket_listed(const struct controller *controller)
{
    char wanted[SPDK_NVMF_TRADDR_MAX_LEN + 16], line[512];
    snprintf(wanted, sizeof wanted, " %s/cntrl\n", controller->id.traddr);
    FILE *sockets = fopen("/proc/net/unix", "re");
    if (!sockets)
        return 0;
    int found = 0;
    while (!found && fgets(line, sizeof line, sockets))
        found = strstr(line, wanted) != NULL;
    fclose(sockets);
    return found;
}

int controller_target_lives(const struct controller *controller)
{
    return !controller->watched || socket_listed(controller);
}

static int identify(struct controller *controller)
{
    const struct spdk_nvme_ctrlr_data *data = spdk_nvme_ctrlr_get_data(controller->ctrlr);
    struct spdk_nvme_ns *ns = spdk_nvme_ctrlr_get_ns(controller->ctrlr, controller->nsid);
    if (!ns || !spdk_nvme_ns_is_active(ns))
        return -ENXIO;
    if (spdk_nvme_ns_get_md_size(ns) && spdk_nvme_ns_supports_extended_lba(ns))
        return -EMEDIUMTYPE; /* metadata between the blocks */
    controller->ns = ns;
    controller->lba_bytes = spdk_nvme_ns_get_sector_size(ns);
    if (4096 % controller->lba_bytes)
        return -EMEDIUMTYPE;
    controller->bytes = spdk_nvme_ns_get_num_sectors(ns) * controller->lba_bytes;
    controller->volatile_cache = data->vwc.present;
    trimmed(controller->serial, sizeof controller->serial, data->sn, sizeof data->sn);
    const struct spdk_uuid *uuid = spdk_nvme_ns_get_uuid(ns);
    controller->has_uuid = uuid != NULL;
    if (uuid)
        controller->uuid = *uuid;
    return 0;
}

int controller_open(struct controller *controller, const glue_options *options)
{
    if (!env_is_ours())
        return -ECHILD;
    if (spdk_nvme_transport_id_parse(&controller->id, options->target))
        return -EINVAL;
    controller->nsid = options->nsid;
    controller->admin_timeout_ms = options->admin_timeout_ms;
    controller->fabric = controller->id.trtype == SPDK_NVME_TRANSPORT_TCP;
    controller->local_memory = !controller->fabric;
    int error = claim(controller);
    if (error)
        return error;
    error = connect_to(controller, options);
    if (!error) {
        error = identify(controller);
        if (error)
            spdk_nvme_detach(controller->ctrlr);
    }
    if (error) {
        put_keys(controller);
        unclaim(controller);
        return error;
    }
    controller->watched = is_vfio_user(controller) && socket_listed(controller);
    if (controller->id.trtype == SPDK_NVME_TRANSPORT_PCIE) {
        controller->registers = spdk_nvme_ctrlr_get_registers(controller->ctrlr);
        env_watch_registers(controller->registers);
    }
    return 0;
}

int controller_is_same(const struct controller *controller)
{
    struct spdk_nvme_ns *ns = spdk_nvme_ctrlr_get_ns(controller->ctrlr, controller->nsid);
    if (ns != controller->ns || !spdk_nvme_ns_is_active(ns))
        return 0;
    const struct spdk_uuid *uuid = spdk_nvme_ns_get_uuid(ns);
    if ((uuid != NULL) != controller->has_uuid)
        return 0;
    if (uuid && spdk_uuid_compare(uuid, &controller->uuid))
        return 0;
    return spdk_nvme_ns_get_sector_size(ns) == controller->lba_bytes &&
           spdk_nvme_ns_get_num_sectors(ns) * controller->lba_bytes == controller->bytes;
}

int controller_reset(struct controller *controller)
{
    char serial[sizeof controller->serial];
    int error = spdk_nvme_ctrlr_reset(controller->ctrlr);
    if (error)
        return error;
    const struct spdk_nvme_ctrlr_data *data = spdk_nvme_ctrlr_get_data(controller->ctrlr);
    trimmed(serial, sizeof serial, data->sn, sizeof data->sn);
    return !strcmp(serial, controller->serial) && controller_is_same(controller) ? 0 : -ESTALE;
}

static void *detach(void *ctrlr)
{
    spdk_nvme_detach(ctrlr);
    return NULL;
}

void controller_close(struct controller *controller, int silent)
{
    pthread_t helper;
    if (controller->registers)
        env_unwatch_registers(controller->registers);
    /* Telling a stopped vfio-user target can take for ever. */
    if (silent && !pthread_create(&helper, NULL, detach, controller->ctrlr))
        pthread_detach(helper);
    else
        spdk_nvme_detach(controller->ctrlr);
    put_keys(controller);
    unclaim(controller);
}

void controller_medium(const struct controller *controller, glue_medium *out)
{
    const struct spdk_nvme_ctrlr_data *data = spdk_nvme_ctrlr_get_data(controller->ctrlr);
    memset(out, 0, sizeof *out);
    out->bytes = controller->bytes;
    out->lba_bytes = controller->lba_bytes;
    out->max_command_bytes = spdk_nvme_ns_get_max_io_xfer_size(controller->ns);
    out->volatile_cache = (uint32_t)controller->volatile_cache;
    out->can_trim = (spdk_nvme_ns_get_flags(controller->ns) & SPDK_NVME_NS_DEALLOCATE_SUPPORTED) != 0;
    out->any_memory = !controller->local_memory;
    snprintf(out->transport, sizeof out->transport, "%.15s", controller->id.trstring);
    snprintf(out->serial, sizeof out->serial, "%s", controller->serial);
    trimmed(out->model, sizeof out->model, data->mn, sizeof data->mn);
    trimmed(out->firmware, sizeof out->firmware, data->fr, sizeof data->fr);
    if (controller->has_uuid)
        spdk_uuid_fmt_lower(out->uuid, sizeof out->uuid, &controller->uuid);
}

struct spdk_nvme_qpair *controller_qpair(const struct controller *controller, uint32_t depth)
{
    struct spdk_nvme_io_qpair_opts wanted;
    spdk_nvme_ctrlr_get_default_io_qpair_opts(controller->ctrlr, &wanted, sizeof wanted);
    wanted.delay_cmd_submit = true; /* one doorbell for all that was submitted between two polls */
    if (wanted.io_queue_requests < 4 * depth)
        wanted.io_queue_requests = 4 * depth;
    return spdk_nvme_ctrlr_alloc_io_qpair(controller->ctrlr, &wanted, sizeof wanted);
}
