/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SIGBUS_H
#define SIGBUS_H
#include <signal.h>

/* sigbus.c: from now on the signal is ours first. */
void sigbus_take(void);
/* env_spdk.c: 1 where the fault was in a controller's registers, and SPDK has seen to it. */
int env_took_sigbus(int number, siginfo_t *info, void *context);

#endif
