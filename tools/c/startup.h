/* What a program is given: libfluke::startup::Startup in C. */
#ifndef FLUKE_STARTUP_H
#define FLUKE_STARTUP_H

#include "fluke.h"

struct fluke_file {
    char name[48];
    uint64_t address;
    uint64_t size;
};

struct fluke_startup {
    uint64_t magic;
    uint32_t abi_version;
    uint32_t cpus;
    uint64_t tsc_khz;
    uint64_t heap_start;
    uint64_t heap_size;
    uint64_t image_start;
    uint64_t image_size;
    uint64_t file_count;
    uint64_t args_size;
    uint64_t is_root;
    uint64_t reserved[2];
    fluke_thread_t thread;
    fluke_ref_t space;
    fluke_ref_t parent;
    fluke_ref_t console;
    fluke_ref_t store;
    struct fluke_file files[14];
    char args[2048];
};

_Static_assert(offsetof(struct fluke_startup, thread) == 96, "thread");
_Static_assert(offsetof(struct fluke_startup, space) == 128, "space");
_Static_assert(offsetof(struct fluke_startup, parent) == 160, "parent");
_Static_assert(offsetof(struct fluke_startup, console) == 192, "console");
_Static_assert(offsetof(struct fluke_startup, files) == 256, "files");

/* The first word of a request to the parent (libfluke::parent). */
#define FLUKE_PARENT_EXIT 1ul

/* Tells the parent that the program has ended. */
_Noreturn void fluke_program_exit(struct fluke_startup *startup, unsigned status);

#endif
