/* SPDX-License-Identifier: Apache-2.0 */
/* A namespace behind its NVMe generic device, /dev/ngXnY. */
#ifndef NVME_GENERIC_H
#define NVME_GENERIC_H
#include "glue_api.h"

/* Asks the kernel and the controller. medium->max_command_bytes: a power of two that a command of any
 * memory stays within. -ENOTTY: not such a device; -EACCES: the kernel lets this user send no commands;
 * -ENXIO: the namespace is not active; -EMEDIUMTYPE: metadata, blocks beyond 4 KiB, or not a set of
 * blocks that are written in any order. */
int nvme_generic_identify(int fd, uint32_t *nsid, glue_medium *medium);

#endif
