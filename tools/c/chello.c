/* A Fluke program in C: a mutex, a condition variable and two threads.
 *
 * It is freestanding: all it needs is fluke.h, which is generated from the kernel's own table of
 * entry points, and the startup block that its parent fills in. */
#include "startup.h"

static fluke_mutex_t mutex;
static fluke_cond_t finished;
static fluke_thread_t second;
static int done;
static _Alignas(16) unsigned char stack[16384];

static fluke_ref_t *console;

/* The console's driver wants a count of bytes and so many of them, in whole words. */
static void print(const char *text)
{
    struct {
        uint64_t size;
        char text[64];
    } message = {0};
    struct fluke_ipc_params params = {0};

    while (text[message.size] && message.size < sizeof message.text) {
        message.text[message.size] = text[message.size];
        message.size++;
    }
    params.send.address = (uint64_t)&message;
    params.send.words = 1 + (message.size + 7) / 8;
    fluke_ipc_send(console, &params);
}

static void second_main(void)
{
    fluke_mutex_lock(&mutex);
    print("C: hello from the second thread\n");
    done = 1;
    fluke_cond_signal(&finished);
    fluke_mutex_unlock(&mutex);
    for (;;) /* a thread cannot destroy itself */
        fluke_thread_sleep(UINT64_MAX);
}

static void start_second(struct fluke_startup *startup)
{
    static struct fluke_thread_state state;

    state.thread_va = (uint64_t)&second;
    state.priority = FLUKE_PRIORITY_DEFAULT;
    state.registers.rip = (uint64_t)second_main;
    /* As after a call: the ABI wants rsp + 8 to be a multiple of 16. */
    state.registers.rsp = (uint64_t)(stack + sizeof stack - 8);
    state.registers.rflags = 0x202;
    fluke_thread_set_state(&second, &state, &startup->space, 0, 0, 0, 0);
}

int main(struct fluke_startup *startup)
{
    if (startup->abi_version != FLUKE_ABI_VERSION)
        return 1;
    console = &startup->console;
    if (fluke_mutex_create(&mutex) != FLUKE_SUCCESS || fluke_cond_create(&finished) != FLUKE_SUCCESS
        || fluke_thread_create(&second) != FLUKE_SUCCESS)
        return 2;

    fluke_mutex_lock(&mutex);
    start_second(startup);
    print("C: hello from the first thread\n");
    while (!done)
        fluke_cond_wait(&finished, &mutex);
    fluke_mutex_unlock(&mutex);

    print("C: both threads have run\n");
    return 0;
}

_Noreturn void fluke_program_exit(struct fluke_startup *startup, unsigned status)
{
    uint64_t request[2] = {FLUKE_PARENT_EXIT, status}, reply[2];
    struct fluke_ipc_params params = {0};

    params.send.address = (uint64_t)request;
    params.send.words = 2;
    params.recv.address = (uint64_t)reply;
    params.recv.words = 2;
    fluke_ipc_call(&startup->parent, &params);
    for (;;)
        fluke_thread_sleep(UINT64_MAX);
}
