//! The table of entry points, and nothing that is retyped from it.
//!
//! [`entry_points!`](crate::entry_points) hands every row to a macro of the caller's: the kernel
//! makes its dispatch of it, the user library its stubs, the build script `fluke.h`, and this
//! module [`Entry`] and [`TABLE`]. The rows 1 to 112 are those of fluke-api section 15, with
//! their numbers there; 113 is `mapping_reference`, which only one source has; the rows from 120
//! are ours, for what Fluke leaves to servers that do not exist yet.
//!
//! A row is
//!
//! ```text
//! number kind name object class built (parameter: type, ...) [restart points] "documentation";
//! ```
//!
//! * *kind*: `regs` passes the parameters in `rdi rsi rdx r10 r8 r9 r12 r13`, in that order, and
//!   returns a value in `rax`; `ipc` uses the registers of [`crate::ipc`].
//! * *class*: OSDI '99 table 1. *Restart points* are the entry points that an interrupted call may
//!   turn into, besides itself (fluke-api 8.5).
//! * *built*: `built`, or `missing` while the kernel answers with the insanity `NoEntry`.

/// How long a call may sleep, and where it restarts (OSDI '99 table 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Always runs to completion.
    Trivial,
    /// Normally completes at once; a fault rolls it back.
    Short,
    /// May sleep indefinitely; interrupted, it restarts from its beginning.
    Long,
    /// May sleep indefinitely, and be interrupted at intermediate points.
    MultiStage,
}

/// How parameters travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// `rdi rsi rdx r10 r8 r9 r12 r13`; result in `rax`.
    Registers,
    /// The registers of a message transfer, [`crate::ipc`].
    Message,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Number, passed in the low 16 bits of `rax`.
    pub number: u16,
    /// Name without the `fluke_` prefix.
    pub name: &'static str,
    /// How the parameters travel.
    pub convention: Convention,
    /// Family: an object type's name, `Ipc` or `Machine`.
    pub object: &'static str,
    /// Class.
    pub class: Class,
    /// Whether the kernel has it.
    pub built: bool,
    /// Names and Rust types of the parameters.
    pub parameters: &'static [(&'static str, &'static str)],
    /// Entry points that an interrupted call may turn into, besides itself.
    pub restart_points: &'static [Entry],
    /// What it does.
    pub doc: &'static str,
}

/// Calls `$callback!` with every row of the table, after the tokens given beside it.
#[macro_export]
macro_rules! entry_points {
    ($callback:ident $(, $($extra:tt)*)?) => { $callback! { $($($extra)*)?
1 regs thread_create Thread Short built (new_thread: *mut Thread) [] "Makes `new_thread` a thread: stopped, null links, until `thread_set_state`. Status: Success, NoMemory. (node 9)";
2 regs thread_create_hash Thread Short built (new_thread: *mut Thread, hash: *mut u64) [] "As `thread_create`; `*hash`, if not 0, becomes the hash, and receives the one in use. (node 10)";
3 regs thread_destroy Thread Long built (thread: *mut Thread) [] "Stops and unmakes a thread; its connections break, links to it die. Not on the caller. (node 11)";
4 regs thread_disable_exceptions Thread Trivial built (cur_thread: *mut Thread) [] "Sends synchronous exceptions to the space's keeper and holds back asynchronous ones. (node 12)";
5 regs thread_enable_exceptions Thread Trivial built (cur_thread: *mut Thread) [] "Lets the thread's own handlers take exceptions; those held back are taken now. (node 13)";
6 regs thread_get_client Thread Short built (cur_thread: *mut Thread, client: *mut Ref, flags: *mut u64) [] "Reads the link to the client of the connection in which the caller is server. (node 14)";
7 regs thread_get_handlers Thread Trivial built (cur_thread: *mut Thread, trap: *mut u64, interrupt: *mut u64, client_alert: *mut u64, server_alert: *mut u64) [] "Reads the four handler addresses; each pointer may be null. (node 15)";
8 regs thread_get_saved_state Thread Trivial built (cur_thread: *mut Thread, state: *mut SavedState) [] "Reads the registers saved at the last exception. (node 16)";
9 regs thread_get_server Thread Short built (cur_thread: *mut Thread, server: *mut Ref, flags: *mut u64) [] "Reads the link to the server of the connection in which the caller is client. (node 17)";
10 regs thread_get_state Thread Long built (thread: *mut Thread, state: *mut ThreadState, task: *mut Ref, scheduler: *mut Ref, waiting_for: *mut Ref, client: *mut Ref, server: *mut Ref) [] "Stops a thread at a stage boundary of whatever it does and exports its state; it stays stopped. Any pointer but the first may be null. (node 18)";
11 regs thread_interrupt Thread Long built (thread: *mut Thread) [] "Posts a software interrupt: the thread enters its interrupt handler as soon as it has exceptions enabled. (node 19)";
12 regs thread_move Thread Long built (old_addr: *mut Thread, new_addr: *mut Thread) [] "Re-homes a stopped thread to other memory. (node 20)";
13 regs thread_reference Thread Short built (thread: *mut Thread, new_ref: *mut Ref) [] "Makes `new_ref` link to the thread. (node 21)";
14 regs thread_return_from_exception Thread Trivial built (cur_thread: *mut Thread) [] "Reloads the registers saved at the last exception and enables exceptions. (node 22)";
15 regs thread_self Thread Trivial built () [] "Returns the address of the caller's thread object in its own space. (node 23)";
16 regs thread_set_client Thread Short built (cur_thread: *mut Thread, client: *mut Ref, flags: u64) [] "Replaces the link to the client of the connection in which the caller is server. (node 24)";
17 regs thread_set_handlers Thread Trivial built (cur_thread: *mut Thread, trap: u64, interrupt: u64, client_alert: u64, server_alert: u64) [] "Sets the four handler addresses. (node 25)";
18 regs thread_set_saved_state Thread Trivial built (cur_thread: *mut Thread, state: *const SavedState) [] "Replaces the registers saved at the last exception. (node 26)";
19 regs thread_set_server Thread Short built (cur_thread: *mut Thread, server: *mut Ref, flags: u64) [] "Replaces the link to the server of the connection in which the caller is client. (node 27)";
20 regs thread_set_state Thread Long built (thread: *mut Thread, state: *const ThreadState, task: *mut Ref, scheduler: *mut Ref, waiting_for: *mut Ref, client: *mut Ref, server: *mut Ref) [] "Sets the state of a stopped thread; with STOPPED clear it may run. Null pointer: unchanged; null reference: link cleared. `waiting_for` is ignored. (node 28)";
21 regs thread_schedule Thread Long built (thread: *mut Thread, sleep_port: *mut Port, sensitivity: u64) [] "Donates the caller's time to a thread that asked for it, until a message comes to `sleep_port` or, as `sensitivity` says, the thread has no more use for it. (node 29)";
22 regs task_create Task Short built (new_task: *mut Task) [] "Makes an empty space. (node 34)";
23 regs task_create_hash Task Short built (new_task: *mut Task, hash: *mut u64) [] "As `task_create`, with a hash. (node 35)";
24 regs task_destroy Task Long built (task: *mut Task) [] "Unmakes a space: its threads stop, its mappings and what derives from them vanish. (node 36)";
25 regs task_get_state Task Short built (task: *mut Task, state: *mut TaskState, keeper: *mut Ref) [] "Exports a space's state. (node 37)";
26 regs task_move Task Short built (old_addr: *mut Task, new_addr: *mut Task) [] "Re-homes a space's object. (node 38)";
27 regs task_reference Task Short built (task: *mut Task, new_ref: *mut Ref) [] "Makes `new_ref` link to the space. (node 39)";
28 regs task_set_state Task Short built (task: *mut Task, state: *const TaskState, keeper: *mut Ref) [] "Sets a space's keeper. (node 40)";
29 regs region_create Region Short built (new_region: *mut Region) [] "Makes a region tied to no memory. (node 45)";
30 regs region_create_hash Region Short built (new_region: *mut Region, hash: *mut u64) [] "As `region_create`, with a hash. (node 46)";
31 regs region_destroy Region Short built (region: *mut Region) [] "Unmakes a region; what derives from it vanishes. (node 47)";
32 regs region_get_state Region Short built (region: *mut Region, state: *mut RegionState, task: *mut Ref, keeper: *mut Ref) [] "Exports a region's state. (node 48)";
33 regs region_move Region Short built (old_addr: *mut Region, new_addr: *mut Region) [] "Re-homes a region's object. (node 49)";
34 regs region_protect Region Short built (region: *mut Region, max_prot: u64) [] "Changes the upper limit of permissions; 0 flushes every translation that derives from the region. (node 50)";
35 regs region_reference Region Short built (region: *mut Region, new_ref: *mut Ref) [] "Makes `new_ref` link to the region: the right to map its memory. (node 51)";
36 regs region_search Region MultiStage built (region: *mut Region, offset: *mut u64, size: u64, found: *mut ObjectSpec, found_size: *mut u64) [] "Finds the active objects in `size` bytes of the region from `*offset`. (node 52)";
37 regs region_set_state Region Short built (region: *mut Region, state: *const RegionState, task: *mut Ref, keeper: *mut Ref) [] "Sets a region's range, limit, space and keeper. (node 53)";
38 regs mapping_create Mapping Short built (new_mapping: *mut Mapping) [] "Makes a mapping with no region and no space. (node 58)";
39 regs mapping_create_hash Mapping Short built (new_mapping: *mut Mapping, hash: *mut u64) [] "As `mapping_create`, with a hash. (node 59)";
40 regs mapping_destroy Mapping Short built (mapping: *mut Mapping) [] "Unmakes a mapping; the memory is no longer accessible through it. (node 60)";
41 regs mapping_get_state Mapping Short built (mapping: *mut Mapping, state: *mut MappingState, region: *mut Ref, task: *mut Ref) [] "Exports a mapping's state. (node 61)";
42 regs mapping_move Mapping Short built (old_addr: *mut Mapping, new_addr: *mut Mapping) [] "Re-homes a mapping's object. (node 62)";
43 regs mapping_protect Mapping Short built (mapping: *mut Mapping, prot: u64) [] "Changes a mapping's permissions. (node 63)";
44 regs mapping_set_state Mapping Short built (mapping: *mut Mapping, state: *const MappingState, region: *mut Ref, task: *mut Ref) [] "Sets a mapping's range, permissions, region and space. (node 64)";
45 regs port_create Port Short built (new_port: *mut Port) [] "Makes a port that is in no port set. (node 69)";
46 regs port_create_hash Port Short built (new_port: *mut Port, hash: *mut u64) [] "As `port_create`, with a hash. (node 70)";
47 regs port_destroy Port Short built (port: *mut Port) [] "Unmakes a port; IPC to it fails. (node 71)";
48 regs port_get_state Port Short built (port: *mut Port, state: *mut PortState, pset: *mut Ref) [] "Exports a port's state. (node 72)";
49 regs port_move Port Short built (old_addr: *mut Port, new_addr: *mut Port) [] "Re-homes a port's object. (node 73)";
50 regs port_reference Port Short built (port: *mut Port, new_ref: *mut Ref) [] "Makes `new_ref` link to the port: the right to send to it. (node 74)";
51 regs port_set_state Port Short built (port: *mut Port, state: *const PortState, pset: *mut Ref) [] "Sets a port's alias and port set. (node 75)";
52 regs pset_create Pset Short built (new_pset: *mut Pset) [] "Makes an empty port set. (node 80)";
53 regs pset_create_hash Pset Short built (new_pset: *mut Pset, hash: *mut u64) [] "As `pset_create`, with a hash. (node 81)";
54 regs pset_destroy Pset Short built (pset: *mut Pset) [] "Unmakes a port set; threads that wait on it restart and fail. (node 82)";
55 regs pset_get_state Pset Short built (pset: *mut Pset, state: *mut PsetState) [] "Exports a port set's state. (node 83)";
56 regs pset_move Pset Short built (old_addr: *mut Pset, new_addr: *mut Pset) [] "Re-homes a port set's object. (node 84)";
57 regs pset_reference Pset Short built (pset: *mut Pset, new_ref: *mut Ref) [] "Makes `new_ref` link to the port set. (node 85)";
58 regs pset_set_state Pset Short built (pset: *mut Pset, state: *const PsetState) [] "Sets nothing; checks its parameters. (node 86)";
59 ipc ipc_call Ipc MultiStage built (dest: *mut Ref, params: *mut Params) [] "Idempotent request, and wait for the reply. Success, ConnectInvalidDest. (node 91)";
60 ipc ipc_client_connect_send Ipc MultiStage built (dest: *mut Ref, params: *mut Params) [ipc_client_send] "Makes a reliable connection, breaking an old one, and sends. (node 92)";
61 ipc ipc_client_connect_send_over_receive Ipc MultiStage built (dest: *mut Ref, params: *mut Params) [ipc_client_send_over_receive, ipc_client_over_receive, ipc_client_receive] "Reliable RPC. (node 93)";
62 ipc ipc_reply Ipc MultiStage built (params: *mut Params) [] "Ends the idempotent call the thread serves; ignored if there is none. (node 94)";
63 ipc ipc_reply_wait_receive Ipc MultiStage built (params: *mut Params) [ipc_wait_receive, ipc_server_receive] "`ipc_reply`, then `ipc_wait_receive`. (node 95)";
64 ipc ipc_send Ipc MultiStage built (dest: *mut Ref, params: *mut Params) [] "One-way message; success does not prove delivery. (node 96)";
65 ipc ipc_server_ack_send_wait_receive Ipc MultiStage built (params: *mut Params) [ipc_server_send_wait_receive, ipc_wait_receive, ipc_server_receive] "Takes the connection over, sends, disconnects, waits for the next message: the server loop. (node 97)";
66 ipc ipc_server_send_wait_receive Ipc MultiStage built (params: *mut Params) [ipc_wait_receive, ipc_server_receive] "Sends, disconnects, waits for the next message. (node 98)";
67 ipc ipc_setup_wait_receive Ipc MultiStage built (pset: *mut Pset, params: *mut Params) [ipc_wait_receive, ipc_server_receive] "Makes the caller a server on `pset` and waits for a message. (node 99)";
68 ipc ipc_client_ack_send Ipc MultiStage built (params: *mut Params) [ipc_client_send] "Accepts or forces the reversal of the connection, then sends. (node 100)";
69 ipc ipc_client_ack_send_over_receive Ipc MultiStage built (params: *mut Params) [ipc_client_send_over_receive, ipc_client_over_receive, ipc_client_receive] "`ack_send`, then `over_receive`. (node 101)";
70 regs ipc_client_alert Ipc Short built () [] "Raises an asynchronous exception in the server. (node 102)";
71 regs ipc_client_disconnect Ipc Short built () [] "Ends the connection in which the caller is client. (node 103)";
72 ipc ipc_client_over_receive Ipc MultiStage built (params: *mut Params) [ipc_client_receive] "Turns the connection over and receives. (node 104)";
73 ipc ipc_client_receive Ipc MultiStage built (params: *mut Params) [] "Receives until a resource is full, the sender turns over, or it disconnects. (node 105)";
74 ipc ipc_client_send Ipc MultiStage built (params: *mut Params) [] "Sends; sleeps until the receiver has taken all. (node 106)";
75 ipc ipc_client_send_over_receive Ipc MultiStage built (params: *mut Params) [ipc_client_over_receive, ipc_client_receive] "`send`, then `over_receive`. (node 107)";
76 ipc ipc_server_ack_send Ipc MultiStage built (params: *mut Params) [ipc_server_send] "Accepts or forces the reversal of the connection, then sends. (node 100)";
77 ipc ipc_server_ack_send_over_receive Ipc MultiStage built (params: *mut Params) [ipc_server_send_over_receive, ipc_server_over_receive, ipc_server_receive] "`ack_send`, then `over_receive`. (node 101)";
78 regs ipc_server_alert Ipc Short built () [] "Raises an asynchronous exception in the client. (node 102)";
79 regs ipc_server_disconnect Ipc Short built () [] "Ends the connection in which the caller is server. (node 103)";
80 ipc ipc_server_over_receive Ipc MultiStage built (params: *mut Params) [ipc_server_receive] "Turns the connection over and receives. (node 104)";
81 ipc ipc_server_receive Ipc MultiStage built (params: *mut Params) [] "Receives until a resource is full, the sender turns over, or it disconnects. (node 105)";
82 ipc ipc_server_send Ipc MultiStage built (params: *mut Params) [] "Sends; sleeps until the receiver has taken all. (node 106)";
83 ipc ipc_server_send_over_receive Ipc MultiStage built (params: *mut Params) [ipc_server_over_receive, ipc_server_receive] "`send`, then `over_receive`. (node 107)";
84 ipc ipc_wait_receive Ipc MultiStage built (params: *mut Params) [ipc_server_receive] "Waits for a message of any flavour on the port set given to `setup_wait_receive`. (node 108)";
85 regs mutex_create Mutex Short built (new_mutex: *mut Mutex) [] "Makes an unlocked mutex. (node 113)";
86 regs mutex_create_hash Mutex Short built (new_mutex: *mut Mutex, hash: *mut u64) [] "As `mutex_create`, with a hash. (node 114)";
87 regs mutex_destroy Mutex Short built (mutex: *mut Mutex) [] "Unmakes an unlocked mutex. (node 115)";
88 regs mutex_get_state Mutex Short built (mutex: *mut Mutex, state: *mut MutexState, owner: *mut Ref) [] "Exports a mutex's state. (node 116)";
89 regs mutex_lock Mutex Long built (mutex: *mut Mutex) [] "Sleeps until the caller owns the mutex. (node 117)";
90 regs mutex_move Mutex Short built (old_addr: *mut Mutex, new_addr: *mut Mutex) [] "Re-homes a mutex's object. (node 118)";
91 regs mutex_reference Mutex Short built (mutex: *mut Mutex, new_ref: *mut Ref) [] "Makes `new_ref` link to the mutex. (node 119)";
92 regs mutex_set_state Mutex Short built (mutex: *mut Mutex, state: *const MutexState, owner: *mut Ref) [] "Sets a mutex's state. (node 120)";
93 regs mutex_trylock Mutex Short built (mutex: *mut Mutex) [] "Takes the mutex if it is free. Success, MutexHeld. (node 121)";
94 regs mutex_unlock Mutex Short built (mutex: *mut Mutex) [] "Releases the mutex and wakes a waiter. (node 122)";
95 regs cond_broadcast Cond Short built (cond: *mut Cond) [] "Wakes all waiters. (node 127)";
96 regs cond_create Cond Short built (new_cond: *mut Cond) [] "Makes a condition variable. (node 128)";
97 regs cond_create_hash Cond Short built (new_cond: *mut Cond, hash: *mut u64) [] "As `cond_create`, with a hash. (node 129)";
98 regs cond_destroy Cond Short built (cond: *mut Cond) [] "Unmakes a condition variable; waiters go on to relock. (node 130)";
99 regs cond_get_state Cond Short built (cond: *mut Cond, state: *mut CondState, inheritor: *mut Ref) [] "Exports a condition variable's state. (node 131)";
100 regs cond_move Cond Short built (old_addr: *mut Cond, new_addr: *mut Cond) [] "Re-homes a condition variable's object. (node 132)";
101 regs cond_reference Cond Short built (cond: *mut Cond, new_ref: *mut Ref) [] "Makes `new_ref` link to the condition variable. (node 133)";
102 regs cond_set_state Cond Short built (cond: *mut Cond, state: *const CondState, inheritor: *mut Ref) [] "Sets a condition variable's state. (node 134)";
103 regs cond_signal Cond Short built (cond: *mut Cond) [] "Wakes one waiter, if there is one. (node 135)";
104 regs cond_wait Cond MultiStage built (cond: *mut Cond, mutex: *mut Mutex) [mutex_lock] "Releases `mutex`, sleeps on `cond`, locks `mutex` again. May wake without cause. (node 136)";
105 regs ref_check Ref Short built (reference: *mut Ref) [] "Returns 1 if the reference links to a live object, else 0. (node 141)";
106 regs ref_compare Ref Short built (first: *mut Ref, second: *mut Ref) [] "Returns 1 if both link to the same object or both are null, else 0. (node 142)";
107 regs ref_copy Ref Short built (source: *mut Ref, target: *mut Ref) [] "Makes `target` link to what `source` links to. (node 143)";
108 regs ref_create Ref Short built (new_ref: *mut Ref) [] "Makes a null reference. (node 144)";
109 regs ref_destroy Ref Short built (reference: *mut Ref) [] "Unmakes a reference; its target is unaffected. (node 145)";
110 regs ref_hash Ref Short built (reference: *mut Ref) [] "Returns the hash of the target; 0 for a null reference. (node 146)";
111 regs ref_move Ref Short built (old_addr: *mut Ref, new_addr: *mut Ref) [] "Re-homes a reference's object. (node 147)";
112 regs ref_type Ref Short built (reference: *mut Ref) [] "Returns the type of the target, 0 for a null reference. (node 148)";
113 regs mapping_reference Mapping Short built (mapping: *mut Mapping, new_ref: *mut Ref) [] "Makes `new_ref` link to the mapping. (not in the manual)";
120 regs thread_sleep Thread Long built (deadline: u64) [] "Sleeps until `clock_read` reaches `deadline`, nanoseconds. (ours)";
121 regs clock_read Machine Trivial built () [] "Returns nanoseconds since boot. (ours)";
122 regs cpu_self Machine Trivial built () [] "Returns the number of the CPU that the caller runs on. (ours)";
123 regs supervisor_call Machine Short built (function: u64, argument: u64) [] "Calls `extern \"C\" fn(u64) -> u64` of the kernel image in supervisor mode, and returns what it returns. Only in the kernel's own space. (ours, OSDI '99 5.6)";
124 regs machine_exit Machine Trivial built (status: u64) [] "Ends the machine with that exit status. Only in the root space. (ours)";
125 regs machine_census Machine Short built (census: *mut Census) [] "Counts the objects and page-table pages of the whole machine. (ours)";
126 regs machine_tell Machine Trivial built (address: u64) [] "Tells whoever tests the machine from the host of memory of the caller's; nobody else listens. (ours)";
127 regs machine_listen Machine Long built (heard: u64) [] "Sleeps until the host has rung the doorbell other than `heard` times; returns how often it has. (ours)";
    } };
}

macro_rules! convention {
    (regs) => {
        Convention::Registers
    };
    (ipc) => {
        Convention::Message
    };
}

macro_rules! is_built {
    (built) => {
        true
    };
    (missing) => {
        false
    };
}

macro_rules! table {
    ($($number:literal $kind:ident $name:ident $object:ident $class:ident $built:ident
       ($($parameter:ident: $ty:ty),*) [$($restart:ident),*] $doc:literal;)*) => {
        /// Number of an entry point.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        #[allow(non_camel_case_types, reason = "the names are the field's")]
        pub enum Entry { $(#[doc = $doc] $name = $number,)* }

        impl Entry {
            /// The entry point with number `n`.
            pub const fn from_number(n: u16) -> Option<Self> {
                match n { $($number => Some(Self::$name),)* _ => None }
            }

            /// The entry point's row in [`TABLE`].
            pub fn row(self) -> &'static Row {
                &TABLE[match self { $(Self::$name => Index::$name as usize,)* }]
            }
        }

        #[allow(non_camel_case_types)]
        enum Index { $($name,)* }

        /// Every entry point, in order of numbers.
        pub static TABLE: &[Row] = &[$(Row {
            number: $number,
            name: stringify!($name),
            convention: convention!($kind),
            object: stringify!($object),
            class: Class::$class,
            built: is_built!($built),
            parameters: &[$((stringify!($parameter), stringify!($ty)),)*],
            restart_points: &[$(Entry::$restart,)*],
            doc: $doc,
        },)*];
    };
}

entry_points!(table);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_ascend_and_find_their_rows() {
        for pair in TABLE.windows(2) {
            assert!(pair[0].number < pair[1].number);
        }
        for row in TABLE {
            let entry = Entry::from_number(row.number).unwrap();
            assert_eq!(entry.row().name, row.name);
        }
    }

    #[test]
    fn the_112_of_the_manual_have_the_documented_classes() {
        let count = |class| {
            TABLE
                .iter()
                .filter(|r| r.number <= 112 && r.class == class)
                .count()
        };
        assert_eq!(
            [Class::Trivial, Class::Short, Class::Long, Class::MultiStage].map(count),
            [8, 72, 8, 24],
            "fluke-api 15.1"
        );
    }

    #[test]
    fn only_multi_stage_calls_turn_into_other_calls() {
        for row in TABLE.iter().filter(|r| !r.restart_points.is_empty()) {
            assert_eq!(row.class, Class::MultiStage, "{}", row.name);
        }
    }
}
