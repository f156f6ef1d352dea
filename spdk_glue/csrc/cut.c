/* SPDX-License-Identifier: Apache-2.0 */
/* How a transfer becomes commands, and how a command that was moved in part goes on. */
#include "queue.h"

/* One more run for the command; memory that continues the last segment joins it. */
static int add_segment(struct command *command, unsigned capacity, uint64_t address, uint64_t bytes)
{
    struct iovec *last = command->niov ? &command->iov[command->niov - 1] : NULL;
    if (last && (uint64_t)(uintptr_t)last->iov_base + last->iov_len == address)
        last->iov_len += bytes;
    else if (command->niov < capacity)
        command->iov[command->niov++] = (struct iovec){(void *)(uintptr_t)address, bytes};
    else
        return 0;
    command->bytes += bytes;
    return 1;
}

static void next_run(struct transfer *transfer)
{
    const glue_piece *piece = &transfer->pieces[transfer->piece];
    transfer->in_run = 0;
    if (++transfer->head < piece->heads)
        return;
    transfer->head = 0;
    if (++transfer->block < piece->blocks)
        return;
    transfer->block = 0;
    transfer->cut_all = ++transfer->piece == transfer->count;
}

static uint64_t run_address(const glue_piece *piece, const struct transfer *at)
{
    return piece->address + at->block * piece->block_stride + at->head * piece->head_stride + at->in_run;
}

/* Bytes of the piece before this place, in the medium's order. */
static uint64_t bytes_before(const glue_piece *piece, const struct transfer *at)
{
    return ((uint64_t)at->block * piece->heads + at->head) * piece->run_bytes + at->in_run;
}

static uint64_t medium_offset(const glue_piece *piece, const struct transfer *at)
{
    if (piece->medium_stride)
        return piece->offset + at->head * piece->medium_stride + at->in_run;
    return piece->offset + bytes_before(piece, at);
}

void command_cut(glue_queue *queue, struct transfer *transfer, struct command *command)
{
    uint32_t begun = transfer->piece;
    const glue_piece *piece = &transfer->pieces[begun];
    *command = (struct command){
        .iov = command->iov, .owner = transfer, .op = transfer->op, .file = (uint32_t)piece->file};
    if (transfer->op >= GLUE_TRIM) {
        command->offset = piece->offset;
        command->span = piece_bytes(piece);
        transfer->cut_all = ++transfer->piece == transfer->count;
        return;
    }
    command->offset = medium_offset(piece, transfer);
    command->piece = begun;
    command->begin = bytes_before(piece, transfer);
    while (!transfer->cut_all && transfer->piece == begun && command->bytes < queue->command_bytes) {
        uint64_t left = piece->run_bytes - transfer->in_run;
        uint64_t room = queue->command_bytes - command->bytes;
        uint64_t take = left < room ? left : room;
        if (!add_segment(command, queue->iov_capacity, run_address(piece, transfer), take))
            break;
        transfer->in_run += take;
        if (transfer->in_run < piece->run_bytes)
            continue;
        next_run(transfer);
        if (piece->medium_stride)
            break; /* the next run lies elsewhere */
    }
}

void command_advance(struct command *command, uint64_t moved)
{
    command->offset += moved;
    command->bytes -= moved;
    command->moved += moved;
    while (moved) {
        struct iovec *segment = &command->iov[command->first];
        uint64_t step = moved < segment->iov_len ? moved : segment->iov_len;
        segment->iov_base = (char *)segment->iov_base + step;
        segment->iov_len -= step;
        moved -= step;
        if (!segment->iov_len) {
            command->first++;
            command->niov--;
        }
    }
}
