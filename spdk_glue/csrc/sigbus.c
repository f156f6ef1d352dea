/* SPDX-License-Identifier: Apache-2.0 */
/* A bus error is a touch of memory behind which there is nothing any more: a controller that was pulled out, or
 * a page of a mapped file that the kernel took away and its drive does not give back. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "glue_api.h"
#include "sigbus.h"

static struct sigaction before;
static atomic_flag taken = ATOMIC_FLAG_INIT, told = ATOMIC_FLAG_INIT;
static char lost_page_text[512];
static atomic_size_t lost_page_bytes;

/* Where nobody else has the signal the process would end without a word. */
static void end_with_text(void)
{
    if (atomic_flag_test_and_set(&told))
        for (;;)
            pause(); /* another thread is at it */
    ssize_t written = write(STDERR_FILENO, lost_page_text, atomic_load(&lost_page_bytes));
    (void)written;
    _exit(1);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    if (env_took_sigbus(number, info, context))
        return;
    int ours = !(before.sa_flags & SA_SIGINFO) && before.sa_handler == SIG_DFL;
    if (ours && info->si_code == BUS_ADRERR && atomic_load(&lost_page_bytes))
        end_with_text();
    sigaction(number, &before, NULL); /* the access is repeated, and meets whoever was here before */
}

void sigbus_take(void)
{
    if (atomic_flag_test_and_set(&taken))
        return;
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGBUS, &ours, &before);
}

int glue_on_lost_page(const char *text)
{
    size_t bytes = strlen(text);
    if (bytes > sizeof lost_page_text)
        return -EINVAL;
    if (atomic_load(&lost_page_bytes))
        return 0;
    memcpy(lost_page_text, text, bytes);
    atomic_store(&lost_page_bytes, bytes);
    sigbus_take();
    return 0;
}
