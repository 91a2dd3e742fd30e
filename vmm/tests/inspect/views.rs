//! What views say of machines at any moment must fit together.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flukevm::config::Configuration;
use flukevm::crash::demangle;
use flukevm::image;
use flukevm::inspect::{Place, View};
use flukevm::point::Point;
use flukevm::vm::Vm;
use object::{Object, ObjectSymbol};
use serde_json::Value;

use super::{configurations, image_of, paused, views};

/// How often to look for a moment at which nobody changes the kernel's state.
const MOMENTS: u32 = 100;

fn see(vm: &mut Vm, view: View) -> Value {
    let seen = vm.inspect(&view);
    seen.unwrap_or_else(|error| panic!("{view:?}: {error}"))
        .json
}

/// Runs on for a little.
fn run_on(vm: &mut Vm, time: Duration) {
    vm.resume();
    assert!(vm.wait(time).is_none(), "the program ended");
    vm.pause().unwrap();
}

fn rows(view: &Value) -> &[Value] {
    view["rows"].as_array().unwrap()
}

/// `thread 3`.
fn name(name: &Value) -> String {
    format!("{} {}", name["kind"].as_str().unwrap(), name["index"])
}

fn names(members: &Value) -> Vec<String> {
    assert!(members["error"].is_null(), "{members}");
    members["names"]
        .as_array()
        .unwrap()
        .iter()
        .map(name)
        .collect()
}

/// All views at one moment.
struct Moment {
    cpus: Value,
    threads: Value,
    spaces: Value,
    queues: Value,
    frames: Value,
    by_kind: BTreeMap<&'static str, Value>,
    memory: u64,
}

impl Moment {
    fn of(vm: &mut Vm) -> Self {
        let by_kind = [
            ("port", View::Ports),
            ("pset", View::Psets),
            ("mutex", View::Mutexes),
            ("cond", View::Conds),
            ("ref", View::Refs),
            ("region", View::Regions),
            ("objects", View::Objects),
        ];
        Self {
            cpus: see(vm, View::Cpus),
            threads: see(vm, View::Threads),
            spaces: see(vm, View::Spaces { id: None }),
            queues: see(vm, View::Queues),
            frames: see(vm, View::Frames),
            by_kind: by_kind.map(|(kind, view)| (kind, see(vm, view))).into(),
            memory: vm.memory().size(),
        }
    }

    /// Whether nobody is changing the kernel's state.
    fn is_quiet(&self) -> bool {
        self.cpus["notes"].is_null()
    }

    fn check(&self) {
        for view in [&self.threads, &self.queues, &self.frames]
            .into_iter()
            .chain(self.by_kind.values())
        {
            assert!(view["notes"].is_null(), "{view}");
        }
        self.check_cpus();
        self.check_waits();
        self.check_queues();
        self.check_connections();
        self.check_memory();
        self.check_counts();
    }

    /// A current thread is scheduled and runs there, and nobody else runs.
    fn check_cpus(&self) {
        let mut running = BTreeMap::new();
        for cpu in rows(&self.cpus)
            .iter()
            .filter(|cpu| !cpu["thread"].is_null())
        {
            running.insert(name(&cpu["thread"]), cpu["number"].clone());
        }
        for thread in rows(&self.threads) {
            let state = &thread["state"];
            let runs = state["scheduled"] == "running";
            let cpu = running.get(&name(&thread["name"]));
            assert_eq!(cpu, runs.then_some(&state["cpu"]), "{thread}");
            assert!(!runs || state["run"] == "scheduled", "{thread}");
        }
        for cpu in rows(&self.cpus) {
            assert!(cpu["mode"] != "user" || cpu["in_user"] == true, "{cpu}");
        }
    }

    /// Who waits for an object is in its queue, and nobody else is.
    fn check_waits(&self) {
        let mut waiting: BTreeMap<(String, &str), BTreeSet<String>> = BTreeMap::new();
        for thread in rows(&self.threads) {
            let wait = &thread["state"]["wait"];
            let (queue, object) = match wait["kind"].as_str() {
                Some("Mutex" | "Cond") => ("waiters", 0),
                Some("Port" | "Ask") => ("clients", 0),
                Some("Time") => ("wanting", 0),
                Some("Schedule") => ("donors", 1),
                Some("Pset") => ("servers", 0),
                _ => continue,
            };
            assert_eq!(thread["state"]["scheduled"], "off", "{thread}");
            let object = name(&wait["objects"][object]);
            let queued = waiting.entry((object, queue)).or_default();
            queued.insert(name(&thread["name"]));
        }
        for kind in ["port", "pset", "mutex", "cond"] {
            for row in rows(&self.by_kind[kind]) {
                for queue in ["waiters", "clients", "wanting", "donors", "servers"] {
                    if row[queue].is_null() {
                        continue;
                    }
                    let queued = BTreeSet::from_iter(names(&row[queue]));
                    let found = waiting.remove(&(name(&row["name"]), queue));
                    assert_eq!(queued, found.unwrap_or_default(), "{queue} of {row}");
                }
                if kind == "mutex" && !names(&row["waiters"]).is_empty() {
                    assert!(row["locked"] == true, "{row}");
                }
            }
        }
        assert!(
            waiting.is_empty(),
            "threads wait for what has no queue of them: {waiting:?}"
        );
    }

    /// Run queues have those that are ready there, and all of them.
    fn check_queues(&self) {
        let mut queued = BTreeMap::new();
        for queue in self.queues["ready"].as_array().unwrap() {
            for thread in names(&queue["threads"]) {
                assert!(
                    queued.insert(thread, queue["cpu"].clone()).is_none(),
                    "{queue}"
                );
            }
        }
        let sleepers = self.queues["sleepers"].as_array().unwrap().iter();
        let sleepers: BTreeSet<_> = sleepers.map(|sleeper| name(&sleeper["thread"])).collect();
        let lockers = BTreeSet::from_iter(names(&self.queues["lockers"]));
        for thread in rows(&self.threads) {
            let (thread, state) = (name(&thread["name"]), &thread["state"]);
            let is = |what: &str| state["scheduled"] == what;
            assert_eq!(
                queued.remove(&thread),
                is("ready").then(|| state["cpu"].clone())
            );
            assert_eq!(sleepers.contains(&thread), is("asleep"), "{thread}");
            assert_eq!(lockers.contains(&thread), is("locking"), "{thread}");
        }
        assert!(queued.is_empty());
    }

    /// The partner of a connection has the other end of it.
    fn check_connections(&self) {
        let mut ends = BTreeSet::new();
        for thread in rows(&self.threads) {
            for end in thread["connections"].as_array().unwrap() {
                let ids = [name(&thread["name"]), name(&end["partner"])];
                ends.insert((ids, end["role"].as_str().unwrap(), end["sender"] == true));
            }
        }
        for ([thread, partner], role, sender) in &ends {
            let other = if *role == "client" {
                "server"
            } else {
                "client"
            };
            let back = ([partner.clone(), thread.clone()], other, !sender);
            assert!(ends.contains(&back), "{thread} and {partner}: {ends:?}");
        }
    }

    /// Mappings lead to memory that is there, and page tables are made of the pool's pages.
    fn check_memory(&self) {
        let mut tables = 0;
        for space in rows(&self.spaces) {
            assert!(space["error"].is_null(), "{space}");
            if space["own"] == false {
                tables += space["tables"].as_u64().unwrap();
            }
            for mapping in space["mappings"].as_array().unwrap() {
                assert!(mapping["error"].is_null(), "{mapping}");
                if let Some(physical) = mapping["physical"].as_u64() {
                    assert!(physical < self.memory, "{mapping}");
                }
            }
        }
        let pages = &self.frames["pages"];
        let live = pages["live"].as_u64().unwrap() - pages["husks"].as_u64().unwrap();
        assert_eq!(tables, live, "{pages}");
    }

    /// What is listed is what the kernel counts.
    fn check_counts(&self) {
        let rooms = self.frames["objects"].as_array().unwrap().iter();
        let live: BTreeMap<_, _> = rooms
            .map(|room| {
                (
                    room["kind"].as_str().unwrap(),
                    room["live"].as_u64().unwrap(),
                )
            })
            .collect();
        let threads = [("thread", &self.threads), ("space", &self.spaces)];
        let others = self.by_kind.iter().map(|(kind, view)| (*kind, view));
        for (kind, view) in threads
            .into_iter()
            .chain(others.filter(|(kind, _)| *kind != "objects"))
        {
            assert_eq!(rows(view).len() as u64, live[kind], "{kind}");
        }
        assert_eq!(live["entity"], live["thread"]);
        let listed = rows(&self.by_kind["objects"]).iter();
        let listed: usize = listed
            .map(|frame| frame["objects"].as_array().unwrap().len())
            .sum();
        let kinds = live
            .iter()
            .filter(|(kind, _)| !["entity", "table"].contains(kind));
        assert_eq!(listed as u64, kinds.map(|(_, live)| live).sum::<u64>());
    }
}

/// The kernel's entry for traps: who is there has nothing of the kernel's yet.
fn trap_entry(kernel: Configuration) -> u64 {
    let file = object::File::parse(image::kernel(image_of(kernel)).unwrap()).unwrap();
    let named = |symbol: &object::Symbol<'_, '_>| {
        let name = symbol.name().map(demangle);
        name.is_ok_and(|name| name == "fluke_kernel::arch::entry::trap")
    };
    file.symbols().find(named).unwrap().address()
}

/// Runs the vCPUs of a paused machine out of the kernel, one after the other, for as long as one waits for
/// another; says whether that went.
fn leave_kernel(vm: &mut Vm, vcpus: u32, trap: u64) -> bool {
    const ROUNDS: u32 = 10;
    for _ in 0..ROUNDS {
        let mut outside = true;
        for id in 0..vcpus {
            let vcpu = vm.registers(id).unwrap();
            if vcpu.special.cs.dpl == 0 && !vcpu.halted && vcpu.general.rip != trap {
                let limit = Duration::from_millis(100);
                outside &= vm.run_to(id, Point::Address(trap), limit).unwrap();
            }
        }
        if outside {
            return true;
        }
    }
    false
}

#[test]
fn views_fit_together_whenever_nobody_is_in_the_kernel() {
    for kernel in configurations() {
        let trap = trap_entry(kernel);
        for vcpus in [1, 2] {
            for (program, wanted) in [("spin", 1), ("stress", 2), ("fuzz", 2)] {
                let mut vm = paused(kernel, vcpus, program, Duration::from_millis(700));
                let mut quiet = 0;
                for _ in 0..MOMENTS {
                    if leave_kernel(&mut vm, vcpus, trap) {
                        let moment = Moment::of(&mut vm);
                        // At level full somebody may own the kernel without being on a CPU.
                        if moment.is_quiet() {
                            moment.check();
                            quiet += 1;
                        }
                    }
                    if quiet >= wanted {
                        break;
                    }
                    run_on(&mut vm, Duration::from_millis(20));
                }
                assert!(
                    quiet >= wanted,
                    "{kernel}, {vcpus} vCPUs, {program}: {quiet} quiet moments"
                );
            }
        }
    }
}

#[test]
fn every_view_can_be_had_at_any_moment() {
    for kernel in configurations() {
        let mut vm = paused(kernel, 2, "tour", Duration::from_millis(300));
        for _ in 0..4 {
            for view in views() {
                let report = vm.inspect(&view).unwrap();
                assert!(
                    !report.text.is_empty() && report.json.is_object(),
                    "{view:?}"
                );
            }
            run_on(&mut vm, Duration::from_millis(100));
        }
    }
}

#[test]
fn a_thread_is_seen_in_its_call_and_in_its_code() {
    for kernel in configurations() {
        let mut vm = paused(kernel, 1, "spin", Duration::from_millis(700));
        let threads = see(&mut vm, View::Threads);
        let root = &rows(&threads)[0];
        assert_eq!(root["call"]["entry"], "ipc_wait_receive", "{root}");
        assert_eq!(root["call"]["phase"], "in");
        let wait = &root["state"]["wait"];
        let set = format!("a message on {}", name(&wait["objects"][0]));
        assert_eq!(
            (&wait["kind"], &wait["text"]),
            (&"Pset".into(), &set.into())
        );
        let current = &see(&mut vm, View::Cpus)["rows"][0]["thread"];
        let mut spinning = rows(&threads).iter();
        let spinning = spinning.find(|thread| thread["name"] == *current).unwrap();
        assert_eq!(spinning["call"]["phase"], "user code", "{spinning}");
        assert_eq!(spinning["call"]["registers"], "vCPU 0");
        let rip = vm.registers(0).unwrap().general.rip;
        assert_eq!(spinning["call"]["rip"], rip);
        let id = current["index"].as_u64().unwrap();
        let one = vm.inspect(&View::Thread { id }).unwrap();
        assert!(
            one.text.contains(&format!("rip {rip:#018x}")),
            "{}",
            one.text
        );
        assert!(one.text.contains("stop_requested: false"), "{}", one.text);
        let code = vm.inspect(&View::Code { at: Place::Cpu(0) }).unwrap();
        assert!(code.text.contains("jmp"), "{}", code.text);
        let missing = vm.inspect(&View::Thread { id: 99 }).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "there is no thread 99; see the view `threads`"
        );
    }
}

#[test]
fn kernel_code_has_its_stack_and_source_lines() {
    for kernel in configurations() {
        let mut vm = paused(kernel, 1, "stress", Duration::from_millis(700));
        let mut moments = 0..MOMENTS;
        // The stubs are assembly, which has no lines.
        loop {
            let cpu = &see(&mut vm, View::Cpus)["rows"][0];
            let stack = vm.inspect(&View::Stack { cpu: 0 }).unwrap().text;
            if cpu["mode"] == "kernel" && stack.lines().next().unwrap().contains(".rs:") {
                break;
            }
            assert!(moments.next().is_some(), "never in the kernel: {stack}");
            run_on(&mut vm, Duration::from_millis(3));
        }
        let address = see(&mut vm, View::Cpus)["rows"][0]["rip"].as_u64().unwrap();
        let at = Place::Address(address);
        let code = see(&mut vm, View::Code { at });
        let instructions = code["instructions"].as_array().unwrap();
        assert_eq!(instructions[0]["address"], address);
        assert!(instructions.iter().any(|i| !i["line"].is_null()), "{code}");
    }
}

#[test]
fn one_vcpu_steps_and_the_others_stay() {
    for kernel in configurations() {
        let mut vm = paused(kernel, 2, "stress", Duration::from_millis(700));
        let mut moments = 0..MOMENTS;
        let stepped = loop {
            assert!(moments.next().is_some(), "never far enough from user code");
            let before = [vm.registers(0).unwrap(), vm.registers(1).unwrap()];
            let at = before[0].general.rip;
            if before[0].special.cs.dpl == 0
                && !before[0].halted
                && vm
                    .run_to(0, Point::Steps(3), Duration::from_secs(2))
                    .unwrap()
            {
                assert_eq!(vm.registers(1), Some(before[1]));
                assert!(!vm.is_running());
                break vm.registers(0).unwrap().general.rip != at;
            }
            run_on(&mut vm, Duration::from_millis(3));
        };
        assert!(stepped, "three instructions led to where they began");
        // It goes on as if nothing had been.
        run_on(&mut vm, Duration::from_millis(50));
    }
}

#[test]
fn a_saved_machine_shows_what_the_running_one_did() {
    for kernel in configurations() {
        let mut vm = paused(kernel, 2, "stress", Duration::from_millis(700));
        let snapshot = vm.snapshot().unwrap();
        let seen: Vec<_> = views()
            .iter()
            .map(|view| vm.inspect(view).unwrap())
            .collect();
        run_on(&mut vm, Duration::from_millis(50));
        for (view, seen) in views().iter().zip(seen) {
            assert_eq!(snapshot.inspect(view).unwrap(), seen, "{view:?}");
        }
    }
}

#[test]
fn a_machine_that_has_not_booted_says_so() {
    for kernel in configurations() {
        let config = flukevm::config::VmConfig::fluke(kernel, "spin", &[]).unwrap();
        let mut vm = Vm::new(config).unwrap();
        let error = vm.inspect(&View::Threads).unwrap_err().to_string();
        assert!(error.contains("has not set itself up yet"), "{error}");
        let stack = vm.inspect(&View::Stack { cpu: 0 }).unwrap().text;
        assert!(stack.contains("_start"), "{stack}");
    }
}
