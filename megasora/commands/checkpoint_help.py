"""What `megasora checkpoint VERB --help` says."""

CHECKPOINT = """\
inspect, verify and diff read checkpoints and write nothing. reshape and average write a run folder with a new one.
prune deletes checkpoints. export writes one for other programs: one .safetensors file, or a folder of MegaSora, of
diffusers, of torch.distributed.checkpoint or of DeepSpeed. import-wan reads a Wan model as diffusers saves it or as
it was released; import-dcp and import-deepspeed read checkpoints of those programs. A checkpoint of any layout is
read; tensors are read one at a time.

example: megasora checkpoint inspect runs/demo"""

INSPECT = """\
Reads the newest checkpoint of a run, or the given one, and writes nothing. Prints its step, bytes, the layout that
saved it, the position in the data, the kinds of values that it has (weights, averages, Adam's moments), and a table:
for each module, those of all blocks together, the number of parameters and norm, mean, standard deviation and largest
absolute value of its weights.

example: megasora checkpoint inspect runs/demo --tensors 'blocks.0.*'"""

VERIFY = """\
Reads every byte of the checkpoints of a run, or of the given one, and changes nothing. Prints for each whether it is
whole, or which file is damaged; the exit code is 2 if one is not whole.

example: megasora checkpoint verify runs/demo"""

DIFF = """\
Reads two checkpoints of one model, of any layouts, and writes nothing. Prints for each kind of values how many
tensors differ, and of those that differ most the number of elements, the largest absolute difference, and the norm of
the difference relative to that of A; then what differs in the state. The exit code is 0 if they are equal, 1 if they
differ, 2 if they are of different models. The layout, the code and the settings that saved them do not count.

example: megasora checkpoint diff runs/a runs/b/checkpoints/step-00001000"""

RESHAPE = """\
Reads a checkpoint and writes the run folder RUN with the same one, bit for bit the same values, in N files of about
equal size. A run of many processes saves many small files: reshape makes few large ones, before a checkpoint is
archived or copied, or before a start on a file system that is slow to open files. No layout needs it: any number of
processes resumes from any number of files.

example: megasora checkpoint reshape runs/demo --processes 8 --out runs/demo8"""

AVERAGE = """\
Reads several checkpoints of one model; writes the run folder RUN whose weights are their mean, for megasora sample,
or for run.start=init:RUN/checkpoints/step-00000000 of another run.
--sigma reads all checkpoints of one run that was trained with optim.ema_sigmas, e.g. [0.05,0.1], and reconstructs the
power-function average of another width by least squares [arXiv 2312.02696]: a long average for the end of a training,
or a short one. Prints how well the width is approximated; more kept checkpoints (checkpoint.keep_every) approximate
more.

example: megasora checkpoint average runs/a runs/b --out runs/mean
example: megasora checkpoint average runs/demo --sigma 0.08 --out runs/demo-0.08"""

PRUNE = """\
Reads manifests and states of the checkpoints of a run, and deletes those that no rule keeps, never the newest. It
holds the lock of the run, so a run that trains is left alone: its own rules are checkpoint.keep, keep_every and
keep_best. Damaged checkpoints count for no rule and stay. Prints the bytes that are freed.

example: megasora checkpoint prune runs/demo --keep 2 --keep-every 10000 --dry-run"""

EXPORT = """\
Reads the newest checkpoint of a run, or the given one, and verifies its checksums. Writes OUT, whole or not at all:
safetensors   one file of all weights, for other programs, or for run.start=init:OUT of another run
megasora      a folder with config.json, weights, a model card, and a file of plain PyTorch that loads them
diffusers     a folder that diffusers loads, of a run whose weights have the layout of Wan
dcp           a folder of torch.distributed.checkpoint
deepspeed     a folder that DeepSpeed's load_checkpoint continues from: weights, AdamW's moments, number of steps

example: megasora checkpoint export runs/demo --out demo.safetensors
example: megasora checkpoint export runs/demo --format deepspeed --zero-stage 2 --processes 8 --out demo-deepspeed"""

IMPORT_WAN = """\
Reads FOLDER/transformer, or FOLDER itself: config.json and the weights of a text-to-video model, with the names of
diffusers, of the release of Wan or of ComfyUI; of these also a single file, .safetensors or .pth. Writes FILE, fp32,
4 bytes per weight; then prints the settings of a run that starts from it, to append to `megasora train YAML`.
--run writes a run folder in place of FILE: the weights as the checkpoint of step 0, and config.yaml with the codec
(FOLDER/vae) and the text encoder (FOLDER/text_encoder) of the pipeline, for `megasora sample RUN`.

example: megasora checkpoint import-wan Wan2.1-T2V-1.3B-Diffusers --out wan.safetensors
example: megasora checkpoint import-wan Wan2.1-T2V-1.3B-Diffusers --run runs/wan"""

IMPORT_DCP = """\
Reads FOLDER, one tensor at a time, and unpickles nothing but tables of names and sizes. Writes the run folder RUN:
the weights as the checkpoint of step 0, to sample from or for run.start=init:, with the settings that are given; or,
of `export --format dcp --everything`, the whole training state, which the run goes on from.

example: megasora checkpoint import-dcp exported --run runs/back --config runs/demo/config.yaml"""

IMPORT_DEEPSPEED = """\
Reads a checkpoint of ZeRO 1, 2 or 3, of any number of processes, and unpickles nothing but tensors and names. Writes
the run folder RUN with its fp32 weights and AdamW's moments, from which megasora train goes on. --config has the
settings of the model.

example: megasora checkpoint import-deepspeed demo-deepspeed --run runs/back --config runs/demo/config.yaml"""
