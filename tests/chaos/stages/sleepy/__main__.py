from __future__ import annotations

import os
import sys
import threading
import time

from parampara.execution.child import Stage, main
from parampara.schemas.ingest import IngestConfig
from parampara.schemas.stages import DaptConfig, DeployConfig, DpoConfig, EvaluateConfig, MergeConfig, QuantizeConfig, SftConfig
from sleepy import stages

if __name__ == "__main__":
    if "PARAMPARA_DATABASE__URL" in os.environ and sys.argv[1] != "worker":
        sys.exit("a stage process must not see the settings")
    print(
        "settings and secrets:", {name: value for name, value in os.environ.items() if name.startswith("PARAMPARA_EVAL")}, file=sys.stderr
    )
    main(
        "sleepy",
        stages={
            "dapt": Stage(DaptConfig, lambda: stages.dapt),
            "sft": Stage(SftConfig, lambda: stages.sft),
            "dpo": Stage(DpoConfig, lambda: stages.dpo),
            "merge": Stage(MergeConfig, lambda: stages.merge),
            "quantize": Stage(QuantizeConfig, lambda: stages.quantize),
            "evaluate": Stage(EvaluateConfig, lambda: stages.evaluate),
            "deploy": Stage(DeployConfig, lambda: stages.deploy),
            "ingest": Stage(IngestConfig, lambda: stages.ingest),
        },
        queue="train",
        preloads={"quiet": lambda: None, "threaded": lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()},
    )
