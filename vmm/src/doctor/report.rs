//! The answers, for people and for machines.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fluke_abi::boot::Gate;
use serde::{Serialize, Serializer};

/// How the host runs code at CPL 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cpl0 {
    /// On the processor.
    Hardware,
    /// One by one in KVM's instruction emulator.
    Emulated,
}

/// What the host can do. As JSON, the keys are the names of the fields.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The KVM device that was probed.
    pub kvm_path: String,
    /// Version of its API.
    pub kvm_api_version: i32,
    /// How kernels run.
    pub cpl0: Cpl0,
    /// Whether `syscall` at CPL 3 enters CPL 0, and `sysret` returns.
    pub syscall_from_user: bool,
    /// The trap instruction for user programs: `"syscall"` or `"ud2"`.
    #[serde(serialize_with = "serialize_gate")]
    pub gate: Gate,
    /// Whether SSE instructions work at CPL 0.
    pub sse_at_cpl0: bool,
    /// Whether the timer of an x2APIC interrupts CPL 0 and CPL 3.
    pub x2apic_timer: bool,
    /// Whether one vCPU can interrupt another.
    pub x2apic_ipi: bool,
    /// Whether KVM can stop after every instruction at CPL 0.
    pub single_step: bool,
    /// Whether KVM can stop after every instruction at CPL 3.
    pub single_step_at_cpl3: bool,
    /// Whether KVM can stop at an address at CPL 0.
    pub hardware_breakpoints: bool,
    /// Whether KVM can stop at an address at CPL 3.
    pub hardware_breakpoints_at_cpl3: bool,
    /// Whether KVM tells which pages were written.
    pub dirty_log: bool,
    /// Whether KVM follows what this process writes to a guest's page tables.
    pub host_page_tables: bool,
    /// Whether the time-stamp counter of a guest can be set.
    pub settable_tsc: bool,
    /// Most vCPUs of a machine.
    pub max_vcpus: usize,
    /// Most vCPUs that KVM recommends.
    pub recommended_vcpus: usize,
    /// Nanoseconds for an instruction at CPL 0.
    pub cpl0_instruction_ns: Option<f64>,
    /// Nanoseconds for an instruction at CPL 3.
    pub cpl3_instruction_ns: Option<f64>,
    /// Nanoseconds from CPL 3 to CPL 0 and back, through the gate.
    pub gate_round_trip_ns: Option<f64>,
    /// The same if `ud2` is the gate.
    pub ud2_round_trip_ns: Option<f64>,
    /// The same if `syscall` is the gate, where it can be.
    pub syscall_round_trip_ns: Option<f64>,
    /// Nanoseconds for an `out` to the VMM and back.
    pub pio_exit_ns: Option<f64>,
    /// Nanoseconds for a single step.
    pub single_step_ns: Option<f64>,
    /// Why something does not work or could not be measured, by the name of its field.
    pub problems: BTreeMap<&'static str, String>,
}

fn serialize_gate<S: Serializer>(gate: &Gate, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(name(*gate))
}

fn name(gate: Gate) -> &'static str {
    match gate {
        Gate::Ud2 => "ud2",
        Gate::Syscall => "syscall",
    }
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The field of [`Report`] it is about.
    pub key: &'static str,
    /// What was looked at.
    pub name: &'static str,
    /// What was found.
    pub value: String,
    /// What that means for the user.
    pub meaning: String,
    /// What the probe saw, if it did not work.
    pub why: Option<String>,
}

impl Report {
    /// The report line by line.
    pub fn findings(&self) -> Vec<Finding> {
        let mut lines = vec![
            self.line(
                "kvm_api_version",
                "KVM API",
                self.kvm_api_version.to_string(),
                format!("{} can be used.", self.kvm_path),
            ),
            self.line(
                "cpl0",
                "Kernel code (CPL 0)",
                match self.cpl0 {
                    Cpl0::Hardware => "hardware",
                    Cpl0::Emulated => "emulated",
                },
                match self.cpl0 {
                    Cpl0::Hardware => "Kernels run at the speed of the processor.",
                    Cpl0::Emulated => {
                        "KVM emulates it instruction by instruction; only programs are fast."
                    }
                },
            ),
        ];
        lines.extend(self.gate_lines());
        lines.extend(self.feature_lines());
        lines.extend(self.cost_lines());
        lines
    }

    fn gate_lines(&self) -> [Finding; 2] {
        [
            self.feature(
                "syscall_from_user",
                "syscall from CPL 3",
                self.syscall_from_user,
                "It enters the kernel, and sysret returns.",
                "User programs must trap in another way.",
            ),
            self.line(
                "gate",
                "Trap gate",
                name(self.gate),
                match self.gate {
                    Gate::Ud2 => "User programs enter the kernel by an invalid instruction.",
                    Gate::Syscall => "User programs enter the kernel the fast way.",
                },
            ),
        ]
    }

    fn feature_lines(&self) -> [Finding; 11] {
        [
            self.feature(
                "sse_at_cpl0",
                "SSE at CPL 0",
                self.sse_at_cpl0,
                "Kernels may use it; those of flukevm do not.",
                "Kernels must be built without it, as those of flukevm are.",
            ),
            self.feature(
                "x2apic_timer",
                "x2APIC timer",
                self.x2apic_timer,
                "Threads are preempted, and can sleep.",
                "Nothing is preempted: programs may hang.",
            ),
            self.feature(
                "x2apic_ipi",
                "x2APIC IPI",
                self.x2apic_ipi,
                "vCPUs can interrupt each other: --vcpus may be more than 1.",
                "vCPUs cannot interrupt each other: use --vcpus 1.",
            ),
            self.feature(
                "single_step",
                "Single-step, CPL 0",
                self.single_step,
                "A machine can be stopped between any two kernel instructions.",
                "Counting kernel instructions, and stopping after some, will not work.",
            ),
            self.feature(
                "single_step_at_cpl3",
                "Single-step, CPL 3",
                self.single_step_at_cpl3,
                "A machine can be stopped between any two instructions of a program.",
                "Programs can be stopped, but not stepped through.",
            ),
            self.feature(
                "hardware_breakpoints",
                "Breakpoints, CPL 0",
                self.hardware_breakpoints,
                "A machine can be stopped at any kernel address.",
                "Stopping at a kernel address will not work.",
            ),
            self.feature(
                "hardware_breakpoints_at_cpl3",
                "Breakpoints, CPL 3",
                self.hardware_breakpoints_at_cpl3,
                "A machine can be stopped at any address of a program.",
                "Stop a program where it enters the kernel instead.",
            ),
            self.feature(
                "dirty_log",
                "Dirty log",
                self.dirty_log,
                "KVM tells which pages were written.",
                "KVM does not tell which pages were written.",
            ),
            self.feature(
                "host_page_tables",
                "Page tables, host",
                self.host_page_tables,
                "KVM follows what flukevm writes to them: resetting a machine is cheapest.",
                "KVM keeps shadows of them, which it drops when a machine is reset.",
            ),
            self.feature(
                "settable_tsc",
                "TSC can be set",
                self.settable_tsc,
                "The time of a saved machine stands still.",
                "Time passes for a saved machine as for this host.",
            ),
            self.line(
                "max_vcpus",
                "vCPUs, at most",
                self.max_vcpus.to_string(),
                format!(
                    "The limit of --vcpus; KVM recommends up to {}.",
                    self.recommended_vcpus
                ),
            ),
        ]
    }

    fn cost_lines(&self) -> Vec<Finding> {
        let mut lines = vec![
            self.cost(
                "cpl0_instruction_ns",
                "CPL 0 instruction",
                self.cpl0_instruction_ns,
                match self.cpl0 {
                    Cpl0::Hardware => "What a kernel instruction costs.",
                    Cpl0::Emulated => "What a kernel costs here is the number of its instructions.",
                },
            ),
            self.cost(
                "cpl3_instruction_ns",
                "CPL 3 instruction",
                self.cpl3_instruction_ns,
                "What an instruction of a user program costs.",
            ),
            self.cost(
                "gate_round_trip_ns",
                "Gate round trip",
                self.gate_round_trip_ns,
                "The least any system call costs, through the gate above.",
            ),
        ];
        if self.gate != Gate::Ud2 {
            lines.push(self.cost(
                "ud2_round_trip_ns",
                "ud2 round trip",
                self.ud2_round_trip_ns,
                "What a system call would cost through the other gate.",
            ));
        }
        lines.extend([
            self.cost(
                "pio_exit_ns",
                "PIO exit",
                self.pio_exit_ns,
                "What a console write or another word to the host costs.",
            ),
            self.cost(
                "single_step_ns",
                "Single step",
                self.single_step_ns,
                "What stepping adds to every kernel instruction.",
            ),
        ]);
        lines
    }

    fn line(
        &self,
        key: &'static str,
        name: &'static str,
        value: impl Into<String>,
        meaning: impl Into<String>,
    ) -> Finding {
        Finding {
            key,
            name,
            value: value.into(),
            meaning: meaning.into(),
            why: self.problems.get(key).cloned(),
        }
    }

    fn feature(
        &self,
        key: &'static str,
        name: &'static str,
        works: bool,
        if_so: &str,
        if_not: &str,
    ) -> Finding {
        let (value, meaning) = if works {
            ("yes", if_so)
        } else {
            ("no", if_not)
        };
        self.line(key, name, value, meaning)
    }

    fn cost(
        &self,
        key: &'static str,
        name: &'static str,
        ns: Option<f64>,
        meaning: &str,
    ) -> Finding {
        match ns {
            Some(ns) => self.line(key, name, duration(ns), meaning),
            None => self.line(key, name, "unknown", "It could not be measured."),
        }
    }

    /// The report as a table for people: a line for each finding, and below what those probes
    /// saw that did not work.
    pub fn to_table(&self) -> String {
        let findings = self.findings();
        let width = |text: fn(&Finding) -> &str| {
            findings
                .iter()
                .map(|finding| text(finding).chars().count())
                .max()
                .unwrap_or(0)
        };
        let names = width(|finding| finding.name);
        let values = width(|finding| &finding.value);
        let mut table = String::new();
        for Finding {
            name,
            value,
            meaning,
            ..
        } in &findings
        {
            let _ = writeln!(table, "{name:names$}  {value:values$}  {meaning}");
        }
        if !self.problems.is_empty() {
            table.push_str("\nWhat the probes saw where something does not work:\n");
        }
        for Finding { name, why, .. } in &findings {
            if let Some(why) = why {
                let _ = writeln!(table, "{name:names$}  {why}");
            }
        }
        table
    }
}

/// A duration with two or three significant digits.
fn duration(ns: f64) -> String {
    let (number, unit) = if ns < 1e3 {
        (ns, "ns")
    } else {
        (ns / 1e3, "us")
    };
    let digits = match number {
        n if n < 1.0 => 2,
        n if n < 100.0 => 1,
        _ => 0,
    };
    format!("{number:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            kvm_path: "/dev/kvm".into(),
            kvm_api_version: 12,
            cpl0: Cpl0::Emulated,
            syscall_from_user: false,
            gate: Gate::Ud2,
            sse_at_cpl0: false,
            x2apic_timer: true,
            x2apic_ipi: true,
            single_step: true,
            single_step_at_cpl3: true,
            hardware_breakpoints: true,
            hardware_breakpoints_at_cpl3: false,
            dirty_log: true,
            host_page_tables: false,
            settable_tsc: false,
            max_vcpus: 1024,
            recommended_vcpus: 2,
            cpl0_instruction_ns: Some(1012.3),
            cpl3_instruction_ns: Some(0.314),
            gate_round_trip_ns: Some(27_123.0),
            ud2_round_trip_ns: Some(27_123.0),
            syscall_round_trip_ns: None,
            pio_exit_ns: None,
            single_step_ns: Some(170_000.0),
            problems: BTreeMap::from([("pio_exit_ns", "no answer within 1 s".into())]),
        }
    }

    #[test]
    fn the_table_is_aligned_and_says_why() {
        let report = report();
        let table = report.to_table();
        for finding in report.findings() {
            let line = table
                .lines()
                .find(|line| line.starts_with(finding.name))
                .unwrap();
            assert_eq!(line.find(&finding.value), Some(21), "{line:?}");
            assert_eq!(line.find(&finding.meaning), Some(31), "{line:?}");
        }
        assert!(
            table.contains("1.0 us") && table.contains("0.31 ns"),
            "{table}"
        );
        assert!(
            table.contains("27.1 us") && table.contains("170 us"),
            "{table}"
        );
        assert!(
            table.contains("PIO exit             unknown   It could not be"),
            "{table}"
        );
        assert!(
            table.ends_with("PIO exit             no answer within 1 s\n"),
            "{table}"
        );
        assert_eq!(
            table.matches("ud2").count(),
            1,
            "the ud2 gate has one cost line: {table}"
        );
    }

    #[test]
    fn the_keys_of_the_json_are_stable() {
        let json = serde_json::to_value(report()).unwrap();
        let mut keys: Vec<&str> = json
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        assert_eq!(
            keys,
            [
                "cpl0",
                "cpl0_instruction_ns",
                "cpl3_instruction_ns",
                "dirty_log",
                "gate",
                "gate_round_trip_ns",
                "hardware_breakpoints",
                "hardware_breakpoints_at_cpl3",
                "host_page_tables",
                "kvm_api_version",
                "kvm_path",
                "max_vcpus",
                "pio_exit_ns",
                "problems",
                "recommended_vcpus",
                "settable_tsc",
                "single_step",
                "single_step_at_cpl3",
                "single_step_ns",
                "sse_at_cpl0",
                "syscall_from_user",
                "syscall_round_trip_ns",
                "ud2_round_trip_ns",
                "x2apic_ipi",
                "x2apic_timer",
            ]
        );
        assert_eq!(json["gate"], "ud2");
        assert_eq!(json["cpl0"], "emulated");
        assert_eq!(json["pio_exit_ns"], serde_json::Value::Null);
        for finding in report().findings() {
            assert!(keys.contains(&finding.key), "{}", finding.key);
        }
    }
}
