/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that engines read into, and facts about files. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "glue_api.h"

static const uint64_t HUGE = 2u << 20;

static uint64_t round_up(uint64_t size, uint64_t unit)
{
    return (size + unit - 1) / unit * unit;
}

/* The mapping reserves its hugepages, so touching them later cannot raise SIGBUS. */
static void *map_hugetlb(uint64_t size)
{
    void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    return address == MAP_FAILED ? NULL : address;
}

/* Aligned to 2 MiB, so that transparent hugepages can back it: over-map, then cut both ends off. */
static void *map_plain(uint64_t size, int *error)
{
    char *wide = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (wide == MAP_FAILED) {
        *error = -errno;
        return NULL;
    }
    char *address = (char *)(uintptr_t)round_up((uint64_t)(uintptr_t)wide, HUGE);
    if (address > wide)
        munmap(wide, (size_t)(address - wide));
    munmap(address + size, (size_t)(wide + HUGE - address));
    return address;
}

void *glue_memory_alloc(uint64_t *size, int best, int *kind, int *error)
{
    *error = *size && *size <= INT64_MAX ? 0 : -EINVAL; /* so rounding up cannot wrap */
    if (*error)
        return NULL;
    void *address = best == GLUE_MEMORY_HUGETLB ? map_hugetlb(round_up(*size, HUGE)) : NULL;
    if (address) {
        *size = round_up(*size, HUGE);
        *kind = GLUE_MEMORY_HUGETLB;
        return address;
    }
    *size = round_up(*size, 4096);
    address = map_plain(*size, error);
    int huge = address && *size >= HUGE && best != GLUE_MEMORY_PLAIN;
    *kind = huge && !madvise(address, *size, MADV_HUGEPAGE) ? GLUE_MEMORY_THP : GLUE_MEMORY_PLAIN;
    if (address && !huge)
        madvise(address, *size, MADV_NOHUGEPAGE); /* fails where the kernel has none anyway */
    return address;
}

void glue_memory_free(void *address, uint64_t size)
{
    munmap(address, size);
}

static int stat_facts(int fd, glue_file_facts *out)
{
    struct stat status;
    if (fstat(fd, &status))
        return -errno;
    out->is_block_device = S_ISBLK(status.st_mode);
    out->is_regular = S_ISREG(status.st_mode);
    out->size = (uint64_t)status.st_size;
    if (out->is_block_device && ioctl(fd, BLKGETSIZE64, &out->size))
        return -errno;
    struct statfs filesystem;
    if (out->is_block_device)
        return 0;
    if (fstatfs(fd, &filesystem))
        return -errno;
    out->fs_magic = (uint32_t)filesystem.f_type;
    return 0;
}

/* Raw statx: the C library of Debian 12 does not know the direct I/O fields (Linux 6.1). */
static void statx_facts(int fd, glue_file_facts *out)
{
    struct {
        uint32_t mask, block_size;
        uint64_t attributes;
        uint32_t before_dio[34];
        uint32_t dio_mem_align, dio_offset_align;
        uint64_t after[12];
    } answer;
    memset(&answer, 0, sizeof answer);
    const unsigned dio = 0x2000, encrypted = 0x800;
    if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, dio, &answer))
        return;
    out->encrypted = (answer.attributes & encrypted) != 0;
    if (answer.mask & dio) {
        out->direct_alignment = answer.dio_offset_align;
        out->memory_alignment = answer.dio_mem_align;
        out->direct_refused = out->is_regular && !answer.dio_offset_align;
    }
}

int glue_file_facts_of(int fd, glue_file_facts *out)
{
    memset(out, 0, sizeof *out);
    int error = stat_facts(fd, out);
    if (error)
        return error;
    statx_facts(fd, out);
    return 0;
}

static int64_t cached_by_mincore(int fd)
{
    struct stat status;
    if (fstat(fd, &status))
        return -errno;
    if (!status.st_size)
        return 0;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t pages = round_up((uint64_t)status.st_size, page) / page;
    void *map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return -errno;
    unsigned char *present = malloc(pages);
    int64_t count = present && !mincore(map, (size_t)status.st_size, present) ? 0 : -ENOMEM;
    for (uint64_t i = 0; count >= 0 && i < pages; i++)
        count += present[i] & 1;
    free(present);
    munmap(map, (size_t)status.st_size);
    return count < 0 ? count : count * (int64_t)page;
}

int glue_cached_pages(int fd, glue_cached *out)
{
    const long cachestat = 451; /* Linux 6.5 */
    uint64_t whole_file[2] = {0, 0};
    uint64_t counts[5] = {0}; /* cached, dirty, writeback, evicted, recently evicted */
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    memset(out, 0, sizeof *out);
    if (!syscall(cachestat, fd, whole_file, counts, 0)) {
        *out = (glue_cached){counts[0] * page, (counts[1] + counts[2]) * page, counts[4] * page};
        return 0;
    }
    if (errno != ENOSYS && errno != EOPNOTSUPP && errno != EPERM)
        return -errno;
    int64_t cached = cached_by_mincore(fd);
    out->cached = cached < 0 ? 0 : (uint64_t)cached;
    return cached < 0 ? (int)cached : 0;
}

int glue_punch(int fd, uint64_t offset, uint64_t bytes)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    return fallocate(fd, mode, (off_t)offset, (off_t)bytes) ? -errno : 0;
}

int glue_lost_writes(int fd)
{
    const off_t nowhere = (off_t)1 << 62; /* whose pages nobody has to wait for */
    int error = sync_file_range(fd, nowhere, 1, SYNC_FILE_RANGE_WAIT_BEFORE);
    return error && errno != ENOSYS ? -errno : 0;
}

static const uintptr_t PAGE = 4096;

static int64_t missing_bytes(char *at, size_t bytes)
{
    unsigned char present[4096];
    int64_t missing = 0;
    for (size_t done = 0; done < bytes;) {
        size_t left = bytes - done, most = sizeof present * PAGE;
        size_t step = left < most ? left : most;
        if (mincore(at + done, step, present))
            return -errno;
        for (size_t page = 0; page < round_up(step, PAGE) / PAGE; page++)
            missing += !(present[page] & 1);
        done += step;
    }
    return missing * (int64_t)PAGE;
}

int64_t glue_resident(uint64_t address, uint64_t bytes)
{
    int64_t missing = missing_bytes((char *)(uintptr_t)address, bytes);
    return missing < 0 ? missing : (int64_t)bytes - missing;
}

static int populate(char *at, size_t bytes)
{
    const int populate_read = 22; /* Linux 5.14; the C library of Debian 11 does not know it */
    if (!madvise(at, bytes, populate_read))
        return 0;
    if (errno != EINVAL)
        return errno == ENOMEM || errno == EINTR ? -errno : -EIO;
    for (size_t page = 0; page < bytes; page += PAGE)
        (void)*(volatile char *)(at + page);
    return 0;
}

/* Ranges no further apart are asked for as one: two calls cost more than the few pages between them. */
static const uint64_t NEAR = 64u << 10;

/* What the ranges lack; `then` is called with those that lack anything. */
static int64_t each_range(uint64_t address, uint64_t bytes, uint64_t stride, uint32_t runs,
                          int (*then)(char *at, size_t bytes))
{
    int64_t total = 0;
    if (runs && stride - bytes <= NEAR) {
        bytes += (runs - 1) * stride;
        runs = 1;
    }
    for (uint32_t run = 0; run < runs; run++) {
        uintptr_t begin = address + run * stride, end = round_up(begin + bytes, PAGE);
        begin -= begin % PAGE;
        int64_t missing = missing_bytes((char *)begin, end - begin);
        int error = missing > 0 ? then((char *)begin, end - begin) : 0;
        if (missing < 0 || error)
            return missing < 0 ? missing : error;
        total += missing;
    }
    return total;
}

static int read_ahead(char *at, size_t bytes)
{
    return madvise(at, bytes, MADV_WILLNEED) ? -errno : 0;
}

int64_t glue_read_ahead(uint64_t address, uint64_t bytes, uint64_t stride, uint32_t runs)
{
    return each_range(address, bytes, stride, runs, read_ahead);
}

int64_t glue_populate(uint64_t address, uint64_t bytes, uint64_t stride, uint32_t runs)
{
    int64_t missing = glue_read_ahead(address, bytes, stride, runs); /* all at once, not page after page */
    if (missing <= 0)
        return missing;
    int64_t error = each_range(address, bytes, stride, runs, populate);
    return error < 0 ? error : missing;
}

int glue_prefault(uint64_t address, uint64_t bytes)
{
    return populate((char *)(uintptr_t)address, bytes);
}
