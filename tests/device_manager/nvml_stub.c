/* A stand-in for the NVIDIA driver's library, with the calls that we make and faults that a file switches on.
 *
 * GPU 0 is whole, GPU 1 has uncorrected ECC errors, GPU 2 is in MIG mode with slices 0 and 2. An NVLink joins GPUs 0 and
 * 1. The driver is an older one: nvmlDeviceGetTemperatureV, nvmlDeviceGetMemoryInfo_v2 and
 * nvmlDeviceGetRetiredPagesPendingStatus do not exist. The file that STUB_FAULT names holds one word: driver, count,
 * handle, memory, temperature, processes, events, or xid:<GPU>:<number>:<instance>, which is an event that comes once. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER = 9, TIMEOUT = 10, LOST = 15, UNKNOWN = 999 };
typedef uintptr_t handle; /* 1, 2, 3: GPUs; 100, 102: slices */

static const char *fault(void) {
    static char word[32];
    word[0] = 0;
    FILE *file = fopen(getenv("STUB_FAULT"), "r");
    if (!file) return word;
    if (fscanf(file, "%31s", word) != 1) word[0] = 0;
    fclose(file);
    return word;
}
static int faulty(const char *call) { return !strcmp(fault(), call); }

static const char *UUIDS[] = {"GPU-00000000-aaaa", "GPU-11111111-aaaa", "GPU-22222222-aaaa"};
static const char *SLICES[] = {"MIG-33333333-aaaa", "", "MIG-44444444-aaaa"};
static int is_slice(handle h) { return h >= 100; }
static int copy(char *to, unsigned size, const char *from) { snprintf(to, size, "%s", from); return OK; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; return faulty("driver") ? NO_DRIVER : OK; }
int nvmlShutdown(void) { return OK; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 3; return faulty("count") ? UNKNOWN : OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, handle *h) { *h = i + 1; return i == 0 && faulty("handle") ? LOST : OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, handle *h) {
    for (unsigned i = 0; i < 3; i++) {
        if (!strcmp(uuid, UUIDS[i])) { *h = i + 1; return OK; }
        if (!strcmp(uuid, SLICES[i])) { *h = 100 + i; return OK; }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(handle h, char *to, unsigned size) { return copy(to, size, is_slice(h) ? SLICES[h - 100] : UUIDS[h - 1]); }
int nvmlDeviceGetName(handle h, char *to, unsigned size) { return copy(to, size, is_slice(h) ? "Stub MIG 1g.5gb" : "Stub GPU"); }
int nvmlDeviceGetMemoryInfo(handle h, uint64_t *memory) {
    memory[0] = (is_slice(h) ? 5ull : 40ull) << 30; memory[1] = 0; memory[2] = 1ull << 30;
    return h == 1 && faulty("memory") ? LOST : OK;
}
int nvmlDeviceGetUtilizationRates(handle h, unsigned *rates) { rates[0] = 25; rates[1] = 0; return is_slice(h) ? NOT_SUPPORTED : OK; }
int nvmlDeviceGetTemperature(handle h, unsigned sensor, unsigned *celsius) {
    (void)sensor; *celsius = 40 + (unsigned)h;
    return is_slice(h) ? NOT_SUPPORTED : h == 1 && faulty("temperature") ? UNKNOWN : OK;
}
int nvmlDeviceGetMigMode(handle h, unsigned *now, unsigned *next) { *now = *next = h == 3; return h == 1 ? NOT_SUPPORTED : OK; }
int nvmlDeviceGetMaxMigDeviceCount(handle h, unsigned *n) { (void)h; *n = 3; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(handle h, unsigned i, handle *slice) { (void)h; *slice = 100 + i; return i == 1 ? NOT_FOUND : OK; }
int nvmlDeviceGetTotalEccErrors(handle h, unsigned kind, unsigned counter, uint64_t *n) {
    *n = h == 2 && kind == 1 && counter == 0 ? 7 : 0;
    return h == 1 ? NOT_SUPPORTED : OK;
}
int nvmlDeviceGetRemappedRows(handle h, unsigned *c, unsigned *u, unsigned *p, unsigned *f) { (void)h; *c = *u = *p = *f = 0; return OK; }

typedef struct { unsigned pid; uint64_t used; unsigned instance, compute; } process;
int nvmlDeviceGetComputeRunningProcesses_v3(handle h, unsigned *n, process *found) {
    if (faulty("processes")) return LOST;
    if (h == 2) { *n = 0; return OK; }
    if (!found) { *n = 2; return TOO_SMALL; }
    found[0].pid = 20 + (unsigned)h; found[1].pid = 10 + (unsigned)h; *n = 2;
    return OK;
}

typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci;
static const char *PLACES[] = {"00000000:3B:00.0", "00000000:5E:00.0", "00000000:86:00.0"};
int nvmlDeviceGetPciInfo_v3(handle h, pci *to) { return copy(to->bus_id, 32, PLACES[h - 1]); }
int nvmlDeviceGetNvLinkState(handle h, unsigned link, unsigned *active) {
    *active = 1;
    return h == 3 ? NOT_SUPPORTED : link == 0 ? OK : INVALID;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(handle h, unsigned link, pci *to) { return copy(to->bus_id, 32, PLACES[h == 1 ? 1 : 0]); }

typedef struct { handle device; uint64_t type, data; unsigned instance, compute; } event;
static int is_broken; /* a set that has failed once fails for good */
int nvmlEventSetCreate(handle *set) { *set = 7; is_broken = 0; return OK; }
int nvmlEventSetFree(handle set) { (void)set; return OK; }
int nvmlDeviceRegisterEvents(handle h, uint64_t types, handle set) { (void)h; return types == 8 && set == 7 ? OK : INVALID; }
int nvmlEventSetWait_v2(handle set, event *to, unsigned timeout_ms) {
    static char told[32];
    char word[32];
    unsigned gpu, xid, instance;
    (void)set; (void)timeout_ms;
    if (is_broken || faulty("events")) return is_broken = 1, LOST;
    snprintf(word, sizeof word, "%s", fault());
    if (!strcmp(word, told) || sscanf(word, "xid:%u:%u:%u", &gpu, &xid, &instance) != 3) return TIMEOUT;
    strcpy(told, word);
    to->device = gpu + 1; to->type = 8; to->data = xid; to->instance = instance ? instance : 0xFFFFFFFF; to->compute = 0;
    return OK;
}
int nvmlDeviceGetGpuInstanceId(handle slice, unsigned *instance) { *instance = (unsigned)slice - 99; return OK; }
