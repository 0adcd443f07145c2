from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf import wrappers_pb2 as _wrappers_pb2
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar
from google.protobuf.any_pb2 import Any as Any
from google.protobuf.duration_pb2 import Duration as Duration
from google.protobuf.empty_pb2 import Empty as Empty
from google.protobuf.timestamp_pb2 import Timestamp as Timestamp
from google.protobuf.wrappers_pb2 import DoubleValue as DoubleValue
from google.protobuf.wrappers_pb2 import FloatValue as FloatValue
from google.protobuf.wrappers_pb2 import Int64Value as Int64Value
from google.protobuf.wrappers_pb2 import UInt64Value as UInt64Value
from google.protobuf.wrappers_pb2 import Int32Value as Int32Value
from google.protobuf.wrappers_pb2 import UInt32Value as UInt32Value
from google.protobuf.wrappers_pb2 import BoolValue as BoolValue
from google.protobuf.wrappers_pb2 import StringValue as StringValue
from google.protobuf.wrappers_pb2 import BytesValue as BytesValue

DESCRIPTOR: _descriptor.FileDescriptor
