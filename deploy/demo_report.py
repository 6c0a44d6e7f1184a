"""Checks what the demo promises beyond two verdicts, from the files that it left, and prints the figures.

Usage: demo_report.py STATE_DIR SUPERVISOR [ENVIRONMENT]
"""

import collections
import json
import pathlib
import subprocess
import sys

MIN_GROUPS = 12
MIN_SHARE_OF_A_WORKER = 0.25
MIN_MIXED_GROUPS = 0.75
MIN_NATURAL_ENDS = 0.90
MIN_DISTRIBUTION = 0.90
MAX_OLD_WEIGHTS_EQUAL = 0.5
MIN_CHANGED = 0.01

state, supervisor = pathlib.Path(sys.argv[1]), sys.argv[2]
# The demo model is trained on word problems; of the other environments it knows nothing.
is_trained_for = sys.argv[3:] in ([], ["gsm8k"])
problems = []


def expect(holds, text):
    print(("  ok    " if holds else "  MISS  ") + text)
    if not holds:
        problems.append(text)


def events(kind):
    for line in (state / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)["event"]
        if event["kind"] == kind:
            yield event


report = json.loads((state / "verify.json").read_text())
uploaded = {event["window"]: event for event in events("window_uploaded")}
spooled = collections.defaultdict(collections.Counter)
for event in events("group_spooled"):
    spooled[event["window"]][event["slot"]] += 1

expect(len(uploaded) == (2 if is_trained_for else 1), f"{len(uploaded)} windows uploaded")
for window in report["windows"]:
    number, shares = window["window"], window["shares"]
    groups = sum(spooled[number].values())
    print(f"window {number}: {window['file']}")
    expect(window["report"]["verdict"] == "success" == window["report"]["all_rows"]["verdict"], "verdicts: success")
    expect(groups >= MIN_GROUPS, f"{groups} groups, {shares['rows']} rollouts, {shares['distinct']} distinct")
    # A reward that is not finite equals none.
    equal = sum(row["checks"]["reward_valid"] for row in window["report"]["all_rows"]["rows"])
    expect(equal == shares["rows"], f"{equal} rewards equal the verifier's")
    if not is_trained_for:
        continue
    for slot, count in sorted(spooled[number].items()):
        expect(count / groups >= MIN_SHARE_OF_A_WORKER, f"worker {slot} proved {count} groups ({count / groups:.0%})")
    expect(len(spooled[number]) == 2, f"{len(spooled[number])} workers proved")
    expect(shares["mixed_groups"] >= MIN_MIXED_GROUPS, f"{shares['mixed_groups']:.1%} of groups have 1-15 successes")
    expect(shares["natural_ends"] >= MIN_NATURAL_ENDS, f"{shares['natural_ends']:.1%} of rows end in a natural EOS")
    expect(shares["shortest"] >= 32, f"shortest completion: {shares['shortest']} tokens")
    expect(shares["distribution"] >= MIN_DISTRIBUTION, f"{shares['distribution']:.1%} of rows pass the distribution check")

if not is_trained_for:
    print("an answer that is right, which the demo model does not write")
    environment = sys.argv[3]
    shown = subprocess.run(
        [supervisor, "env", "show", environment, "--task", "2", "--embedded", "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    payload = json.loads(shown.stdout)["payload"]
    # A formula that equals the answer only for whoever understands formulas.
    right = payload["reference_solution"] if "tests" in payload else f"0 + {payload['answer']}"
    completion = f"because</end_working_out><SOLUTION>{right}</SOLUTION>"
    scored = subprocess.run(
        [supervisor, "env", "score", environment, "-", "--task", "2", "--embedded"],
        input=json.dumps({"completion": completion}), stdout=subprocess.PIPE, text=True, check=True,
    )
    verdict = json.loads(scored.stdout)["evaluation"]
    expect(verdict["success"], f"earns {verdict['reward']:.3f}")
    sys.exit(1 if problems else 0)

print("the roll between the windows")
facts = json.loads((state / "store/grail/checkpoints/checkpoint-3000/DELTA/delta_metadata.json").read_text())
changed = facts["nonzero_params"] / facts["total_params"]
expect(changed >= MIN_CHANGED, f"by DELTA: {changed:.1%} of the weights' elements change")
rolls = list(events("worker_rolled"))
pids = collections.defaultdict(set)
for event in events("worker_ready"):
    pids[event["slot"]].add(event["pid"])
for slot, known in sorted(pids.items()):
    stalls = [roll["stall_us"] for roll in rolls if roll["slot"] == slot and roll["from_changes"]]
    expect(len(known) == 1, f"worker {slot}: process {', '.join(map(str, sorted(known)))} before and after")
    expect(len(stalls) == 1, f"worker {slot}: took the changes, proofs stood still for {sum(stalls)} microseconds")
incarnations = {event["incarnation"] for event in events("server_ready")}
expect(len(incarnations) == 1, "generation server: updated in place, its weights confirmed by a proof worker")

print("the second window under the first checkpoint's weights, which must not pass for the real thing")
first, second = report["windows"][0], report["windows"][1]
context_path = pathlib.Path(second["file"] + ".context.json")
context = json.loads(context_path.read_text())
old = json.loads(pathlib.Path(first["file"] + ".context.json").read_text())
expect(context["checkpoint_window"] != old["checkpoint_window"], "the windows were mined with two checkpoints")
context["model_dir"] = old["model_dir"]
other = context_path.with_name("old-weights.context.json")
other.write_text(json.dumps(context, indent=1))
answer = subprocess.run(
    [supervisor, "verify", second["file"], "--context", str(other), "--json"], stdout=subprocess.PIPE, text=True, check=False
)
exactness = json.loads(answer.stdout)["exactness"]
expect(
    exactness["logprob_equal"] < MAX_OLD_WEIGHTS_EQUAL,
    f"old weights under the new label: {exactness['logprob_equal']:.1%} of logprobs equal, {exactness['sketch_equal']:.1%} of sketches",
)
sys.exit(1 if problems else 0)
