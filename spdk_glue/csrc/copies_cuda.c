/* SPDX-License-Identifier: Apache-2.0 */
/* The copies of transfers: what the I/O thread starts when bytes have arrived, and what it waits for. */
#include "copies.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "copier_cuda.h"

struct copies {
    glue_copier *copier; /* NULL where the transfer only waits */
    cu_stream stream;
    glue_device_piece *pieces;
    glue_event *event; /* recorded at the end, and NULL from then on */
    glue_event **after; /* those that are not done yet */
    uint32_t num_after;
    uint32_t error;
};

/* EXPECTED from here on: nobody takes the event for done before it is recorded. */
static int expect(glue_event *event)
{
    if (event->state == EVENT_EXPECTED) {
        cuda_explain("another transfer is to record the event");
        return -EBUSY;
    }
    event->state = EVENT_EXPECTED;
    event->refs++;
    return 0;
}

static int take_copies(struct copies *copies, const glue_copies *wanted, const glue_piece *pieces, uint32_t count)
{
    copies->pieces = malloc(count * sizeof *copies->pieces);
    if (!copies->pieces)
        return -ENOMEM;
    memcpy(copies->pieces, wanted->pieces, count * sizeof *copies->pieces);
    int error = copier_enter(wanted->copier);
    if (error)
        return error;
    for (uint32_t i = 0; i < count && !error; i++)
        error = copier_check(wanted->copier, &pieces[i]);
    if (!error)
        error = expect(wanted->event);
    if (!error) {
        copies->copier = wanted->copier;
        copies->stream = stream_of(wanted->stream);
        copies->event = wanted->event;
        wanted->copier->refs++;
    }
    copier_leave(wanted->copier);
    return error;
}

static int take_after(struct copies *copies, glue_event *const *after, uint32_t count)
{
    copies->after = malloc((count + 1) * sizeof *copies->after);
    if (!copies->after)
        return -ENOMEM;
    for (; copies->num_after < count; copies->num_after++) {
        glue_event *event = after[copies->num_after];
        pthread_mutex_lock(&event->copier->lock);
        event->refs++;
        pthread_mutex_unlock(&event->copier->lock);
        copies->after[copies->num_after] = event;
    }
    return 0;
}

int copies_new(struct copies **out, const glue_copies *wanted, const glue_piece *pieces, uint32_t count,
               glue_event *const *after, uint32_t num_after)
{
    cuda_explain("");
    struct copies *copies = calloc(1, sizeof *copies);
    if (!copies)
        return -ENOMEM;
    int error = take_after(copies, after, num_after);
    if (!error && wanted)
        error = take_copies(copies, wanted, pieces, count);
    if (error) {
        copies_free(copies);
        return error;
    }
    *out = copies;
    return 0;
}

/* Also where the driver itself was not asked. */
static int failed(struct copies *copies, int error)
{
    if (error < 0 && !copies->error)
        copies->error = error == -ESHUTDOWN || !cuda_last_error() ? CU_DEINITIALIZED : cuda_last_error();
    return error;
}

int copies_may_start(struct copies *copies)
{
    while (copies->num_after) {
        glue_event *last = copies->after[copies->num_after - 1];
        int done = glue_events_done(&last, 1);
        if (done <= 0)
            return failed(copies, done);
        copies->num_after--;
        glue_event_release(last);
    }
    return 1;
}

int copies_start(struct copies *copies, const glue_piece *piece, uint32_t number, uint64_t begin, uint64_t bytes)
{
    if (!copies->copier)
        return 0;
    int error = copier_enter(copies->copier);
    if (error)
        return failed(copies, error);
    const glue_device_piece *device = &copies->pieces[number];
    error = copier_copy_range(copies->copier, GLUE_TO_DEVICE, copies->stream, piece, device, begin, bytes);
    copier_leave(copies->copier);
    return failed(copies, error);
}

int copies_end(struct copies *copies)
{
    if (!copies->event)
        return 0;
    int error = copier_enter(copies->copier);
    if (error)
        return failed(copies, error);
    error = event_record(copies->event, copies->stream);
    event_drop(copies->event);
    copies->event = NULL;
    copier_leave(copies->copier);
    return failed(copies, error);
}

uint32_t copies_error(const struct copies *copies)
{
    return copies->error;
}

/* Nobody will record the event any more: whoever waits for it must not wait for ever. */
static void give_up_event(struct copies *copies)
{
    pthread_mutex_lock(&copies->copier->lock);
    copies->event->state = EVENT_FAILED;
    event_drop(copies->event);
    pthread_mutex_unlock(&copies->copier->lock);
}

void copies_free(struct copies *copies)
{
    if (!copies)
        return;
    while (copies->num_after)
        glue_event_release(copies->after[--copies->num_after]);
    if (copies->event)
        give_up_event(copies);
    if (copies->copier)
        glue_copier_release(copies->copier);
    free(copies->after);
    free(copies->pieces);
    free(copies);
}
