/* SPDX-License-Identifier: Apache-2.0 */
/* Commands in flight: how many and how much they move, what of it is for loads and for stores, and how long
 * the medium was busy with them. */
#include "queue.h"

enum { STORE_SHARE = 4 };

/* Of a command, moved or not. */
static uint64_t size_of(const struct command *command)
{
    return command->bytes + command->moved;
}

void in_flight_begin(glue_queue *queue, const struct command *command)
{
    uint64_t now = clock_ns();
    int op = command->op;
    queue->bytes_in_flight += size_of(command);
    queue->read_bytes_in_flight += op == GLUE_READ ? size_of(command) : 0;
    if (!queue->in_flight++)
        queue->busy_since = now;
    if (op == GLUE_READ && !queue->reads_in_flight++)
        queue->read_since = now;
    if (op == GLUE_WRITE && !queue->writes_in_flight++)
        queue->write_since = now;
}

void in_flight_end(glue_queue *queue, const struct command *command, uint64_t bytes)
{
    uint64_t now = clock_ns();
    int op = command->op;
    queue->bytes_in_flight -= size_of(command);
    queue->read_bytes_in_flight -= op == GLUE_READ ? size_of(command) : 0;
    queue->in_flight--;
    queue->reads_in_flight -= op == GLUE_READ;
    queue->writes_in_flight -= op == GLUE_WRITE;
    pthread_mutex_lock(&queue->lock);
    glue_stats *stats = &queue->stats;
    stats->commands++;
    if (queue->in_flight + 1 > stats->max_in_flight)
        stats->max_in_flight = queue->in_flight + 1;
    /* at every end: a queue that is never idle must count, too */
    stats->busy_ns += now - queue->busy_since;
    queue->busy_since = now;
    if (op == GLUE_READ) {
        stats->read_bytes += bytes;
        stats->read_busy_ns += now - queue->read_since;
        queue->read_since = now;
    } else if (op == GLUE_WRITE) {
        stats->write_bytes += bytes;
        stats->write_busy_ns += now - queue->write_since;
        queue->write_since = now;
    }
    pthread_mutex_unlock(&queue->lock);
}

static struct limit whole_limit(const glue_queue *queue)
{
    uint64_t bytes = queue->options.in_flight_bytes;
    return (struct limit){queue->depth, bytes ? bytes : UINT64_MAX};
}

static struct limit share_of(struct limit whole)
{
    uint32_t commands = whole.commands < 8 ? 1 : whole.commands / STORE_SHARE;
    return (struct limit){commands, whole.bytes / STORE_SHARE};
}

static struct limit without(struct limit whole, struct limit share)
{
    return (struct limit){whole.commands - share.commands, whole.bytes - share.bytes};
}

static int is_below(uint32_t commands, uint64_t bytes, struct limit limit)
{
    return commands < limit.commands && bytes < limit.bytes;
}

/* The next command's own bytes are not known yet: they may go beyond. */
int has_room(const glue_queue *queue, enum lane lane, struct limit limit)
{
    uint32_t loads = queue->reads_in_flight;
    uint64_t load_bytes = queue->read_bytes_in_flight;
    if (!queue->free_commands || !is_below(queue->in_flight, queue->bytes_in_flight, whole_limit(queue)))
        return 0;
    return lane == LOADS ? is_below(loads, load_bytes, limit)
                         : is_below(queue->in_flight - loads, queue->bytes_in_flight - load_bytes, limit);
}

/* While there are both, a share of what may be in flight is for stores alone, and no more than that. */
struct limit limit_of_loads(const glue_queue *queue, int stores)
{
    struct limit whole = whole_limit(queue);
    return stores && whole.commands > 1 ? without(whole, share_of(whole)) : whole;
}

struct limit limit_of_stores(const glue_queue *queue)
{
    struct limit whole = whole_limit(queue);
    return queue->reads_in_flight ? share_of(whole) : whole;
}
