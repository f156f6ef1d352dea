/* SPDX-License-Identifier: Apache-2.0 */
/* Events of a copier. The driver takes an event that was never recorded for one that is done; one of ours
 * that a transfer will yet record is not. */
#include <errno.h>
#include <stdlib.h>

#include "copier_cuda.h"

static glue_event *event_made(glue_copier *copier, int *error)
{
    glue_event *event = calloc(1, sizeof *event);
    *error = event ? 0 : -ENOMEM;
    if (event)
        *error = CHECKED(copier, event_create, &event->handle, CU_EVENT_NO_TIMING);
    if (*error) {
        free(event);
        return NULL;
    }
    event->next = copier->events;
    copier->events = event;
    return event;
}

glue_event *glue_event_new(glue_copier *copier, int *error)
{
    *error = copier_enter(copier);
    if (*error)
        return NULL;
    glue_event *event = copier->free_events;
    if (event)
        copier->free_events = event->next_free;
    else
        event = event_made(copier, error);
    if (event) {
        event->copier = copier;
        event->refs = 1;
        event->state = EVENT_DONE;
        copier->refs++;
        copier->live_events++;
    }
    copier_leave(copier);
    return event;
}

/* The caller has a reference to the copier beside the event's. */
void event_drop(glue_event *event)
{
    glue_copier *copier = event->copier;
    if (--event->refs)
        return;
    event->next_free = copier->free_events;
    copier->free_events = event;
    copier->live_events--;
    copier->refs--;
}

void glue_event_release(glue_event *event)
{
    glue_copier *copier = event->copier;
    copier_ref(copier);
    pthread_mutex_lock(&copier->lock);
    event_drop(event);
    pthread_mutex_unlock(&copier->lock);
    glue_copier_release(copier);
}

int event_record(glue_event *event, cu_stream stream)
{
    glue_copier *copier = event->copier;
    int error = CHECKED(copier, event_record, event->handle, stream);
    event->state = error ? EVENT_FAILED : EVENT_RECORDED;
    return error;
}

int glue_event_record(glue_event *event, uint64_t stream)
{
    int error = copier_enter(event->copier);
    if (error)
        return error;
    error = event->state == EVENT_EXPECTED ? -EBUSY : event_record(event, stream_of(stream));
    copier_leave(event->copier);
    return error;
}

int event_done(glue_event *event)
{
    glue_copier *copier = event->copier;
    if (event->state == EVENT_RECORDED) {
        int error = CHECKED(copier, event_query, event->handle);
        if (error != -EAGAIN)
            event->state = error ? EVENT_FAILED : EVENT_DONE;
    }
    return event->state == EVENT_DONE ? 1 : event->state == EVENT_FAILED ? -EIO : 0;
}

int glue_events_done(glue_event *const *events, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        int done = copier_enter(events[i]->copier);
        if (!done) {
            done = event_done(events[i]);
            copier_leave(events[i]->copier);
        }
        if (done <= 0)
            return done ? done : (int)i;
    }
    return (int)count;
}

int glue_copier_wait(glue_copier *copier, uint64_t stream, glue_event *event)
{
    int error = copier_enter(copier);
    if (error)
        return error;
    if (event->state == EVENT_EXPECTED)
        error = -EAGAIN;
    else if (event->state == EVENT_FAILED)
        error = -EIO;
    else if (event->state == EVENT_RECORDED)
        error = CHECKED(copier, stream_wait, stream_of(stream), event->handle, 0);
    copier_leave(copier);
    return error;
}

/* Those that somebody still has fail from here on. */
void events_destroy(glue_copier *copier)
{
    for (glue_event *event = copier->events; event; event = event->next) {
        copier->driver.event_destroy(event->handle);
        event->handle = NULL;
        if (event->state != EVENT_DONE)
            event->state = EVENT_FAILED;
    }
    copier->free_events = NULL;
}
