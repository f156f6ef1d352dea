/* SPDX-License-Identifier: Apache-2.0 */
/* What ties a transfer to copies of a device: events that it starts after, copies that its commands start,
 * an event behind them. Only the I/O thread and whoever submits use it. */
#ifndef COPIES_H
#define COPIES_H
#include "glue_api.h"

struct copies;

/* 0 or -errno; `count` pieces. Takes references to copier and events. */
int copies_new(struct copies **out, const glue_copies *wanted, const glue_piece *pieces, uint32_t count,
               glue_event *const *after, uint32_t num_after);
/* 1 may start, 0 not yet, -errno an event before it failed. */
int copies_may_start(struct copies *copies);
/* Bytes [begin, begin + bytes) of `piece`, in the medium's order, have arrived. 0 or -errno. */
int copies_start(struct copies *copies, const glue_piece *piece, uint32_t number, uint64_t begin, uint64_t bytes);
/* No copies come any more: record the event behind those that were started. 0 or -errno. */
int copies_end(struct copies *copies);
/* What the driver answered to the call that failed, else 0. */
uint32_t copies_error(const struct copies *copies);
void copies_free(struct copies *copies);

#endif
