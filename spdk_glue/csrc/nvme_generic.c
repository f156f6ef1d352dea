/* SPDX-License-Identifier: Apache-2.0 */
/* Geometry and limits of a namespace: Identify through the generic device, and the block queue's sysfs. */
#include "nvme_generic.h"

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <linux/nvme_ioctl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum {
    IDENTIFY = 0x06, /* opcode */
    OF_NAMESPACE = 0x00,
    OF_CONTROLLER = 0x01,
    DESCRIPTORS = 0x03,
    PAGE_BYTES = 4096,
    MAX_LBAS = 1 << 16, /* the length field of a command */
    FEW_SEGMENTS = 33,  /* of a command, where the kernel does not tell */
};

struct generic {
    int fd;
    uint32_t nsid;
    char name[32]; /* 1n1 of /dev/ng1n1 */
    uint8_t page[PAGE_BYTES];
};

/* sysfs -------------------------------------------------------------------------------------- */

/* The last word of what a link in sysfs points to; 0 or -errno. */
static int link_name(const char *path, char *out, size_t size)
{
    char target[PATH_MAX];
    ssize_t bytes = readlink(path, target, sizeof target - 1);
    if (bytes < 0)
        return -errno;
    target[bytes] = 0;
    const char *slash = strrchr(target, '/');
    const char *name = slash ? slash + 1 : target;
    if (strlen(name) >= size)
        return -ENAMETOOLONG;
    strcpy(out, name);
    return 0;
}

/* Before the first ioctl: of another driver's device that number could mean anything. */
static int check_kind(struct generic *generic)
{
    struct stat status;
    char path[64], subsystem[32], name[32];
    if (fstat(generic->fd, &status))
        return -errno;
    unsigned major = major(status.st_rdev), minor = minor(status.st_rdev);
    snprintf(path, sizeof path, "/sys/dev/char/%u:%u/subsystem", major, minor);
    if (!S_ISCHR(status.st_mode) || link_name(path, subsystem, sizeof subsystem) || strcmp(subsystem, "nvme-generic"))
        return -ENOTTY;
    snprintf(path, sizeof path, "/sys/dev/char/%u:%u", major, minor);
    if (link_name(path, name, sizeof name) || strncmp(name, "ng", 2))
        return -ENOTTY;
    memcpy(generic->name, name + 2, sizeof name - 2);
    return 0;
}

/* A number of the block device's queue, or `unknown`. */
static uint64_t queue_limit(const struct generic *generic, const char *limit, uint64_t unknown)
{
    char path[128];
    unsigned long long value = 0;
    snprintf(path, sizeof path, "/sys/class/block/nvme%s/queue/%s", generic->name, limit);
    FILE *file = fopen(path, "re");
    if (!file)
        return unknown;
    int found = fscanf(file, "%llu", &value);
    fclose(file);
    return found == 1 && value ? value : unknown;
}

static void read_transport(const struct generic *generic, char *out, size_t size)
{
    char path[128];
    snprintf(path, sizeof path, "/sys/class/nvme-generic/ng%s/device/transport", generic->name);
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    if (fgets(out, (int)size, file))
        out[strcspn(out, "\n")] = 0;
    fclose(file);
}

/* identify ----------------------------------------------------------------------------------- */

/* Fills the page: 0, -errno, or -EIO where the controller refuses. */
static int identify(struct generic *generic, uint32_t what)
{
    struct nvme_admin_cmd command = {.opcode = IDENTIFY, .nsid = generic->nsid, .data_len = PAGE_BYTES, .cdw10 = what};
    if (what == OF_CONTROLLER)
        command.nsid = 0;
    command.addr = (uint64_t)(uintptr_t)generic->page;
    memset(generic->page, 0, PAGE_BYTES);
    int status = ioctl(generic->fd, NVME_IOCTL_ADMIN_CMD, &command);
    if (status < 0)
        return errno == EPERM ? -EACCES : -errno;
    return status ? -EIO : 0;
}

static uint64_t number(const uint8_t *at, unsigned bytes)
{
    uint64_t little = 0;
    memcpy(&little, at, bytes);
    return le64toh(little);
}

/* Fields of the controller are padded with spaces. */
static void text(char *out, const uint8_t *from, unsigned bytes)
{
    memcpy(out, from, bytes);
    while (bytes && (out[bytes - 1] == ' ' || !out[bytes - 1]))
        bytes--;
    out[bytes] = 0;
}

/* Bytes 77 MDTS, 520 ONCS, 525 VWC. */
static int ask_controller(struct generic *generic, glue_medium *medium, uint64_t *most)
{
    int error = identify(generic, OF_CONTROLLER);
    if (error)
        return error;
    const uint8_t *page = generic->page;
    text(medium->serial, page + 4, 20);
    text(medium->model, page + 24, 40);
    text(medium->firmware, page + 64, 8);
    medium->can_trim = page[520] >> 2 & 1;
    medium->volatile_cache = page[525] & 1;
    /* In pages of the controller, of which 4 KiB is the smallest there is. */
    *most = page[77] && page[77] < 20 ? (uint64_t)PAGE_BYTES << page[77] : UINT32_MAX;
    return 0;
}

/* Bytes 0 NSZE, 26 FLBAS, from 128 on the formats. */
static int ask_namespace(struct generic *generic, glue_medium *medium)
{
    int error = identify(generic, OF_NAMESPACE);
    if (error)
        return error;
    const uint8_t *page = generic->page;
    unsigned index = (page[26] & 15) | (page[26] >> 1 & 48);
    const uint8_t *format = page + 128 + 4 * index;
    uint64_t lbas = number(page, 8);
    if (!lbas)
        return -ENXIO;
    if (number(format, 2) || format[2] < 9 || format[2] > 12)
        return -EMEDIUMTYPE;
    medium->lba_bytes = 1u << format[2];
    if (lbas > INT64_MAX / medium->lba_bytes)
        return -EMEDIUMTYPE;
    medium->bytes = lbas * medium->lba_bytes;
    return 0;
}

static void format_uuid(char *out, size_t size, const uint8_t *uuid)
{
    char digits[33];
    for (int i = 0; i < 16; i++)
        snprintf(digits + 2 * i, 3, "%02x", uuid[i]);
    snprintf(out, size, "%.8s-%.4s-%.4s-%.4s-%.12s", digits, digits + 8, digits + 12, digits + 16, digits + 20);
}

/* UUID and command set. Controllers before NVMe 1.3 know no such list, and then neither. */
static int ask_descriptors(struct generic *generic, glue_medium *medium)
{
    enum { UUID = 3, COMMAND_SET = 4, HEADER = 4 };
    if (identify(generic, DESCRIPTORS))
        return 0;
    unsigned at = 0;
    while (at + HEADER < PAGE_BYTES && generic->page[at + 1]) {
        const uint8_t *entry = generic->page + at;
        at += HEADER + entry[1];
        if (at > PAGE_BYTES)
            break;
        if (entry[0] == UUID && entry[1] == 16)
            format_uuid(medium->uuid, sizeof medium->uuid, entry + HEADER);
        if (entry[0] == COMMAND_SET && entry[HEADER])
            return -EMEDIUMTYPE;
    }
    return 0;
}

/* limits ------------------------------------------------------------------------------------- */

static uint64_t smaller(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

/* The kernel cuts no command of ours: it must fit, though every page of its memory lies apart and the
 * first one begins in its middle. */
static uint32_t command_limit(const struct generic *generic, uint64_t most, uint32_t lba_bytes)
{
    uint64_t segments = queue_limit(generic, "max_segments", FEW_SEGMENTS);
    most = smaller(most, queue_limit(generic, "max_hw_sectors_kb", FEW_SEGMENTS * 4) * 1024);
    most = smaller(most, segments > 1 ? (segments - 1) * PAGE_BYTES : PAGE_BYTES);
    most = smaller(most, (uint64_t)MAX_LBAS * lba_bytes);
    uint32_t limit = PAGE_BYTES;
    while (limit * 2ull <= most)
        limit *= 2;
    return limit;
}

static int ask(struct generic *generic, glue_medium *medium)
{
    uint64_t most;
    int error = ask_controller(generic, medium, &most);
    if (!error)
        error = ask_namespace(generic, medium);
    if (!error)
        error = ask_descriptors(generic, medium);
    if (error)
        return error;
    medium->max_command_bytes = command_limit(generic, most, medium->lba_bytes);
    medium->any_memory = 1;
    read_transport(generic, medium->transport, sizeof medium->transport);
    return 0;
}

int nvme_generic_identify(int fd, uint32_t *nsid, glue_medium *medium)
{
    struct generic *generic = calloc(1, sizeof *generic);
    if (!generic)
        return -ENOMEM;
    *medium = (glue_medium){0};
    generic->fd = fd;
    int error = check_kind(generic);
    if (!error) {
        int found = ioctl(fd, NVME_IOCTL_ID);
        *nsid = generic->nsid = (uint32_t)found;
        error = found > 0 ? ask(generic, medium) : -ENOTTY;
    }
    free(generic);
    return error;
}
