/* SPDX-License-Identifier: Apache-2.0 */
/* Keys for authentication and TLS, held in memory and named by a number. */
#include <errno.h>
#include <spdk/keyring.h>
#include <spdk/keyring_module.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "spdk_parts.h"

enum { KEY_BYTES = 512 };
struct secret {
    char text[KEY_BYTES];
};

static int nothing(void)
{
    return 0;
}

static void no_clean_up(void)
{
}

static int probe(const char *name)
{
    (void)name;
    return -ENOKEY;
}

static int add(struct spdk_key *key, void *context)
{
    struct secret *secret = spdk_key_get_ctx(key);
    snprintf(secret->text, sizeof secret->text, "%s", (const char *)context);
    return 0;
}

static void forget(struct spdk_key *key)
{
    explicit_bzero(spdk_key_get_ctx(key), sizeof(struct secret));
}

static int get(struct spdk_key *key, void *out, int bytes)
{
    const struct secret *secret = spdk_key_get_ctx(key);
    int needed = (int)strlen(secret->text) + 1;
    if (bytes < needed)
        return -ENOBUFS;
    memcpy(out, secret->text, (size_t)needed);
    return needed - 1;
}

static size_t secret_bytes(void)
{
    return sizeof(struct secret);
}

static struct spdk_keyring_module module = {
    .name = "dualblade",
    .init = nothing,
    .cleanup = no_clean_up,
    .probe_key = probe,
    .add_key = add,
    .remove_key = forget,
    .get_key = get,
    .get_ctx_size = secret_bytes,
};

SPDK_KEYRING_REGISTER_MODULE(dualblade, &module);

struct spdk_key *key_of(const char *text)
{
    static atomic_uint number;
    char name[32];
    if (!text || strlen(text) >= KEY_BYTES)
        return NULL;
    snprintf(name, sizeof name, "key%u", atomic_fetch_add(&number, 1));
    struct spdk_key_opts options = {
        .size = sizeof options, .name = name, .module = &module, .ctx = (void *)(uintptr_t)text};
    if (spdk_keyring_add_key(&options))
        return NULL;
    return spdk_keyring_get_key(name);
}
