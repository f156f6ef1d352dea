/* SPDX-License-Identifier: Apache-2.0 */
/* How long a thread may be kept from a CPU by those that compute. */
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "queue.h"

enum { SLICE_NS = 100000, NORMAL = 0, RESET_ON_FORK = 1 };

/* struct sched_attr of Linux 3.14; the C library of Debian 12 does not have it. */
struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

/* From Linux 6.12 on a thread with a shorter slice runs at once when it wakes, instead of after the slice of
 * whoever computes; it gets no more of the CPU than before. Any user may ask. Older kernels take no notice.
 * Threads that the kernel makes for the ring copy for long: they keep the usual slice. */
void ask_for_short_slices(void)
{
    struct attributes now = {0};
    if (syscall(SYS_sched_getattr, 0, &now, sizeof now, 0) || now.policy != NORMAL)
        return;
    now.size = sizeof now;
    now.flags |= RESET_ON_FORK;
    now.runtime = SLICE_NS;
    syscall(SYS_sched_setattr, 0, &now, 0);
}
