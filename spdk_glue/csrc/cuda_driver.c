/* SPDX-License-Identifier: Apache-2.0 */
/* The CUDA driver library, found at run time. */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>

#include "glue_api.h"

int cuda_errno(cu_result error)
{
    switch (error) {
    case CU_SUCCESS:
        return 0;
    case CU_OUT_OF_MEMORY:
        return -ENOMEM;
    case CU_DEINITIALIZED:
    case CU_NOT_INITIALIZED:
        return -ESHUTDOWN;
    case CU_NO_DEVICE:
    case CU_INVALID_DEVICE:
        return -ENODEV;
    case CU_NOT_READY:
        return -EAGAIN;
    case CU_ALREADY_REGISTERED:
        return -EEXIST;
    case CU_NOT_SUPPORTED:
        return -ENOTSUP;
    default:
        return -EIO;
    }
}

const char *cuda_call_name(enum cuda_call call)
{
#define NAME(name, symbol, parameters) symbol,
    static const char *const names[] = {CUDA_CALLS(NAME)};
#undef NAME
    return names[call];
}

/* memcpy: a pointer to data is no pointer to a function to ISO C. */
static int find(const struct cuda_driver *driver, const char *symbol, void *out)
{
    void *found = dlsym(driver->library, symbol);
    memcpy(out, &found, sizeof found);
    return found != NULL;
}

/* The library stays loaded: its threads and exit handlers would outlive it. */
int cuda_driver_open(struct cuda_driver *driver, const char *library)
{
    memset(driver, 0, sizeof *driver);
    driver->library = dlopen(library ? library : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver->library)
        return -ENOTSUP;
#define FIND(name, symbol, parameters)          \
    if (!find(driver, symbol, &driver->name))   \
        return -ENOTSUP;
    CUDA_CALLS(FIND)
#undef FIND
    return 0;
}
